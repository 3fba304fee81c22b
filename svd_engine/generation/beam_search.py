"""Beam search on the steered distribution, by the rules of transformers' `_beam_search`.

Beams are sums of log-probabilities; one that has ended is ranked by its sum / length **
length_penalty. Every prompt is searched by itself, so it gets the same answer in any batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from svd_engine import ops
from svd_engine.generation.decode_loop import not_finite
from svd_engine.generation.distribution import steered, steered_logits
from svd_engine.generation.logits_processors import LogitsProcess
from svd_engine.generation.sampling_params import SamplingParams
from svd_engine.model.pair import Decoder, PerModel
from svd_engine.steering_config import SteeringConfig

Stop = int | str  # the end-of-sequence token or the stop string that ended a row


@dataclass
class Beam:
    """One way to go on from a prompt."""

    total: float  # sum of the log-probabilities
    parent: int  # the row that it goes on from
    token_ids: list[int]
    logprobs: list[float]
    stop: Stop | None = None
    score: float = -math.inf  # of a beam that has ended


@dataclass
class Search:
    """The beams of one prompt."""

    sampling: SamplingParams
    limit: int
    running: list[Beam] = field(default_factory=list)  # best first
    finished: list[Beam] = field(default_factory=list)  # best first
    done: bool = False

    @property
    def full(self) -> bool:
        return len(self.finished) == self.sampling.num_beams

    def advance(self, candidates: list[Beam]) -> None:
        """Take the candidates of a step, best first: some end, the best others run on."""
        width = self.sampling.num_beams
        length = max((len(beam.token_ids) for beam in candidates), default=0)
        over = [length == self.limit or beam.stop is not None for beam in candidates]
        # Those past the first `width` are there to go on where better ones end.
        ended = [beam for beam, end in zip(candidates[:width], over, strict=False) if end]
        for beam in ended:
            beam.score = beam.total / length**self.sampling.length_penalty
        best = sorted(self.finished + ended, key=lambda beam: beam.score, reverse=True)
        self.finished = best[:width]
        going = [beam for beam, end in zip(candidates, over, strict=True) if not end]
        self.running = going[:width]
        self.done = not self.running or (self.full and not self._can_improve(length))

    def _can_improve(self, length: int) -> bool:
        early = self.sampling.early_stopping
        if early is True:
            return False
        penalty = self.sampling.length_penalty
        reach = self.limit if early == "never" and penalty > 0 else length
        return self.running[0].total / reach**penalty > self.finished[-1].score


@torch.inference_mode()
def search(
    pair: Decoder,
    steering: SteeringConfig,
    rows: list[list[int]],
    sampling: SamplingParams,
    stop: Callable[[int, list[int]], Stop | None],
    candidates: int,
    process: LogitsProcess | None = None,
) -> list[list[Beam]]:
    """The best num_beams completions of each prompt, best first; fewer where there are no more.

    stop: what ends a row, from the prompt's index and the ids generated; None while it goes on.
    candidates: continuations looked at a prompt and step. process: changes the log-probabilities.
    """
    width = sampling.num_beams
    searches = [Search(sampling, sampling.limit(len(row))) for row in rows]
    extra = max((s.limit for s in searches), default=0)
    if extra == 0:
        return [[] for _ in rows]
    logits = pair.logits(pair.prefill(rows, extra, len(rows) * width))
    for i, s in enumerate(searches):
        s.running = [Beam(0.0, i, [], [])]
    while True:
        open_prompts = [i for i, s in enumerate(searches) if not s.done]
        so_far = [rows[i] + beam.token_ids for i in open_prompts for beam in searches[i].running]
        scores, tokens = _best(logits, steering, process, so_far, candidates)
        row = 0
        for i in open_prompts:
            grown = []
            for beam in searches[i].running:
                for score, token in zip(scores[row], tokens[row], strict=True):
                    if math.isnan(score):
                        raise not_finite(so_far[row])
                    if score > -math.inf:  # -inf is off the support
                        grown.append((beam.total + score, row, beam, token, score))
                row += 1
            grown.sort(key=lambda option: option[0], reverse=True)
            options = [
                Beam(total, parent, [*beam.token_ids, token], [*beam.logprobs, score])
                for total, parent, beam, token, score in grown[:candidates]
            ]
            for option in options:
                option.stop = stop(i, option.token_ids)
            searches[i].advance(options)
        running = [beam for s in searches if not s.done for beam in s.running]
        if not running:
            return [s.finished for s in searches]
        pair.reorder(torch.tensor([beam.parent for beam in running], device=pair.device))
        logits = pair.step(torch.tensor([b.token_ids[-1] for b in running], device=pair.device))


def _best(
    logits: PerModel,
    steering: SteeringConfig,
    process: LogitsProcess | None,
    tokens: list[list[int]],
    k: int,
) -> tuple[list[list[float]], list[list[int]]]:
    """The k best log-probabilities of each row and their tokens."""
    k = min(k, logits[0].shape[1])
    if process is None:
        drawn_from = steered(logits, steering)
        best = ops.topk(*drawn_from.operands, k, **drawn_from.mask)
        return best.logprob.tolist(), best.token.tolist()
    processed = process(tokens, steered_logits(logits, steering).log_softmax(-1))
    top = processed.topk(k)
    return top.values.tolist(), top.indices.tolist()
