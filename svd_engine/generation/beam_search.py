"""Beam search on the steered distribution, by the rules of transformers' `_beam_search`.

Running beams are ranked by the sum of their log-probabilities, finished ones by sum / length **
length_penalty. Every prompt is searched by itself, so its answer is the same in any batch.
"""

import math
from dataclasses import dataclass, field

import torch

from svd_engine import ops
from svd_engine.generation.constrained import Row
from svd_engine.generation.decode_loop import not_finite
from svd_engine.generation.distribution import steered
from svd_engine.generation.processed import is_plain, processed
from svd_engine.generation.request import Request
from svd_engine.generation.sampling_params import SamplingParams
from svd_engine.generation.sequence import Sequence
from svd_engine.model.pair import PerModel


@dataclass
class Beam:
    """One way to continue a prompt."""

    total: float  # sum of the log-probabilities
    parent: int  # the batch row that it continues
    token_ids: list[int]
    logprobs: list[float]
    stop_reason: int | str | None = None
    score: float = -math.inf  # of a finished beam


@dataclass
class Search:
    """The beams of one prompt, and the rules by which they continue or finish."""

    sampling: SamplingParams
    sequences: list[Sequence]  # num_return_sequences of the prompt; the best beams fill them
    running: list[Beam] = field(default_factory=list)  # best first
    finished: list[Beam] = field(default_factory=list)  # best first
    is_finished: bool = False

    def advance(self, candidates: list[Beam], is_last: bool) -> None:
        """Take the candidates of a step, best first: some finish, the best others continue.

        is_last: all of them finish.
        """
        width, sequence = self.sampling.num_beams, self.sequences[0]
        length = max((len(beam.token_ids) for beam in candidates), default=0)
        ends = []
        for beam in candidates:
            beam.stop_reason = sequence.find_stop(beam.token_ids)
            is_full = length == sequence.max_new_tokens
            ends.append(is_last or is_full or beam.stop_reason is not None)
        # Candidates past the first `width` only replace better ones that finish.
        ended = [beam for beam, end in zip(candidates[:width], ends, strict=False) if end]
        for beam in ended:
            beam.score = beam.total / length**self.sampling.length_penalty
        best = sorted(self.finished + ended, key=lambda beam: beam.score, reverse=True)
        self.finished = best[:width]
        continued = [beam for beam, end in zip(candidates, ends, strict=True) if not end]
        self.running = continued[:width]
        self.is_finished = not self.running or (self.is_full and not self._can_improve(length))

    @property
    def is_full(self) -> bool:
        return len(self.finished) == self.sampling.num_beams

    def fill_sequences(self) -> None:
        """Copy the best beams into the sequences; if there are too few, repeat the last."""
        for rank, sequence in enumerate(self.sequences):
            if not self.finished:
                sequence.finish("length")
                continue
            beam = self.finished[min(rank, len(self.finished) - 1)]
            sequence.token_ids, sequence.logprobs = [*beam.token_ids], [*beam.logprobs]
            sequence.score = beam.score
            sequence.finish("length" if beam.stop_reason is None else "stop", beam.stop_reason)

    def _can_improve(self, length: int) -> bool:
        """Whether a running beam may still overtake a finished one."""
        early, penalty = self.sampling.early_stopping, self.sampling.length_penalty
        if early is True:
            return False
        longest = self.sequences[0].max_new_tokens
        reach = longest if early == "never" and penalty > 0 else length
        return self.running[0].total / reach**penalty > self.finished[-1].score


@torch.inference_mode()
def search(request: Request, sequences: list[Sequence]) -> None:
    """Search the prompts of the sequences in one batch, and finish the sequences."""
    sampling, decoder = request.sampling, request.decoder
    width, copies = sampling.num_beams, sampling.num_return_sequences
    if max(sequence.max_new_tokens for sequence in sequences) == 0:
        return
    # As in transformers: enough candidates that num_beams continue, however many finish.
    count = max(2, 1 + len(sequences[0].eos_token_ids)) * width
    prompts = len(sequences) // copies
    logits = decoder.logits(request.prefill(sequences, prompts * width))
    searches = [
        Search(sampling, sequences[i * copies : (i + 1) * copies], [Beam(0.0, i, [], [])])
        for i in range(prompts)
    ]
    while True:
        unfinished = [s for s in searches if not s.is_finished]
        rows = [Row(s.sequences[0], b.token_ids) for s in unfinished for b in s.running]
        scores, tokens = _best(request, logits, rows, count)
        is_over, row = request.is_over, 0
        for s in unfinished:
            grown = []
            for beam in s.running:
                for score, token in zip(scores[row], tokens[row], strict=True):
                    if math.isnan(score):
                        raise not_finite(rows[row].all_ids)
                    if score > -math.inf:  # -inf is off the support
                        grown.append((beam.total + score, row, beam, token, score))
                row += 1
            grown.sort(key=lambda candidate: candidate[0], reverse=True)
            s.advance(
                [
                    Beam(total, parent, [*beam.token_ids, token], [*beam.logprobs, score])
                    for total, parent, beam, token, score in grown[:count]
                ],
                is_over,
            )
        running = [beam for s in unfinished if not s.is_finished for beam in s.running]
        if not running:
            break
        decoder.reorder(torch.tensor([beam.parent for beam in running], device=decoder.device))
        latest = [beam.token_ids[-1] for beam in running]
        logits = decoder.step(torch.tensor(latest, device=decoder.device))
    for s in searches:
        s.fill_sequences()


def _best(
    request: Request, logits: PerModel, rows: list[Row], k: int
) -> tuple[list[list[float]], list[list[int]]]:
    """The k best log-probabilities of each row, and their tokens."""
    k = min(k, logits[0].shape[1])
    if is_plain(request):
        drawn_from = steered(logits, request.steering)
        best = ops.topk(*drawn_from.operands, k, **drawn_from.mask)
        return best.logprob.tolist(), best.token.tolist()
    top = processed(request, rows, logits, as_logprobs=True).topk(k)
    return top.values.tolist(), top.indices.tolist()
