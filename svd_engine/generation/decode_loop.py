"""The decode loop: a prefill, then one forward step and one operator call per token."""

from collections.abc import Callable

import torch
from torch import Tensor

from svd_engine import ops
from svd_engine.generation import distribution
from svd_engine.generation.constrained import Row
from svd_engine.generation.cutoffs import cut, has_cutoffs
from svd_engine.generation.distribution import Distribution
from svd_engine.generation.outputs import Event, TopLogprobs
from svd_engine.generation.processed import is_plain, processed
from svd_engine.generation.request import Request
from svd_engine.generation.sequence import Sequence
from svd_engine.generation.top_logprobs import top_logprobs
from svd_engine.model.pair import PerModel


class Batch:
    """Sequences of a request that are decoded together.

        batch = Batch(request, sequences)
        while not batch.is_finished:
            events = batch.step()

    rows: the sequence of each batch row. Finished sequences leave before the next step.
    """

    @torch.inference_mode()
    def __init__(self, request: Request, sequences: list[Sequence]) -> None:
        self.rows = list(sequences)
        self._request, self._decoder = request, request.decoder
        if self.is_finished:
            return
        device = self._decoder.device
        self._seeds = torch.tensor([s.seed for s in sequences], device=device)
        self._positions = torch.tensor([len(s.prompt_ids) for s in sequences], device=device)
        self._tokens = torch.empty(0, dtype=torch.int64)  # drawn in the latest step
        self._logits: PerModel | None = self._prefill()  # None if the tokens are still to be fed

    @property
    def is_finished(self) -> bool:
        return all(sequence.is_finished for sequence in self.rows)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Append one token to every sequence that is not finished; return their events in order."""
        self._drop_finished()
        if self._logits is None:
            self._logits = self._decoder.step(self._tokens)
        logits = self._logits
        self._tokens, logprob, best = self._choose(logits)
        self._positions = self._positions + 1
        fetch = start_fetch(self._tokens, logprob)
        # A decoder that overlaps the host computes the next step while the host reads the tokens.
        if self._overlaps():
            self._logits = self._decoder.step(self._tokens.clamp(min=0))
        else:
            self._logits = None
        tokens, logprobs = fetch()
        is_over = self._request.is_over
        drawn = zip(self.rows, tokens, logprobs, best, strict=True)
        return [self._append(*row, is_over) for row in drawn]

    def _choose(self, logits: PerModel) -> tuple[Tensor, Tensor, list[TopLogprobs | None]]:
        """Each row's token, its log-probability, and its best tokens if they are wanted."""
        drawn_from = self._distribution(logits, self.rows)
        tokens, logprob = self._sample(drawn_from, self._seeds, self._positions)
        return tokens, logprob, self._best(logits, drawn_from)

    def _append(
        self,
        sequence: Sequence,
        token: int,
        logprob: float,
        best: TopLogprobs | None,
        is_over: bool,
    ) -> Event:
        if token < 0:
            raise not_finite(sequence.all_ids)
        return sequence.append(token, logprob, best, is_over)

    def keep_finished(self) -> None:
        """Keep what the sequences that the latest step finished have read."""
        for row, sequence in enumerate(self.rows):
            if sequence.is_finished:
                self._request.keep(row, sequence, tuple(h[row] for h in self._hidden))

    def _prefill(self) -> PerModel:
        copies = self._request.sampling.num_return_sequences
        hidden = self._request.prefill(self.rows, len(self.rows))
        if copies > 1:
            index = torch.arange(len(self.rows) // copies, device=self._decoder.device)
            index = index.repeat_interleave(copies)
            self._decoder.reorder(index)
            hidden = tuple(h[index] for h in hidden)
        self._hidden = hidden
        return self._decoder.logits(hidden)

    def _overlaps(self) -> bool:
        """Whether the next step begins before the host has read the tokens of this one."""
        ends = all(len(s.token_ids) + 1 >= s.max_new_tokens for s in self.rows)
        return self._decoder.overlaps_host and not ends

    def _drop_finished(self) -> None:
        running = [row for row, sequence in enumerate(self.rows) if not sequence.is_finished]
        if len(running) == len(self.rows):
            return
        index = torch.tensor(running, device=self._decoder.device)
        self._decoder.reorder(index)
        self._tokens, self._seeds = self._tokens[index], self._seeds[index]
        self._positions = self._positions[index]
        self._hidden = tuple(h[index] for h in self._hidden)
        if self._logits is not None:
            self._logits = tuple(x[index] for x in self._logits)
        self.rows = [self.rows[row] for row in running]

    def _distribution(self, logits: PerModel, sequences: list[Sequence]) -> Distribution:
        """The steered distribution, after constraints and logits processors if there are any."""
        request = self._request
        if is_plain(request):
            return distribution.steered(logits, request.steering)
        rows = [Row(sequence, sequence.token_ids) for sequence in sequences]
        scores = processed(request, rows, logits)
        if scores.isneginf().all(1).any():
            raise ValueError(
                "logits_processor removed every token that steering left to a row. Steer with "
                "alpha=0 or a finite penalty where tokens are constrained."
            )
        return distribution.unsteered(scores)

    def _best(self, logits: PerModel, drawn_from: Distribution) -> list[TopLogprobs | None]:
        """The top_logprobs of each row, if they are asked for."""
        request = self._request
        if not request.sampling.top_logprobs:
            return [None] * len(logits[0])
        best = top_logprobs(request.sampling.top_logprobs, request.model, logits, drawn_from)
        return [*best]

    def _sample(
        self, drawn_from: Distribution, seeds: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A token of each row, and its log-probability before temperature and cuts."""
        sampling = self._request.sampling
        is_cut = has_cutoffs(sampling)
        left = drawn_from
        if is_cut:
            logits = ops.steer(*drawn_from.operands, **drawn_from.mask).float()
            drawn_from = distribution.unsteered(logits)
            left = distribution.unsteered(cut(sampling, logits))
        token, logprob = ops.sample(
            *left.operands,
            **left.mask,
            temperature=sampling.temperature,
            top_k=0 if is_cut else sampling.top_k,
            top_p=1.0 if is_cut else sampling.top_p,
            min_p=0.0 if is_cut else sampling.min_p,
            seed=seeds,
            position=positions,
        )
        if is_cut:
            logprob = ops.score(*drawn_from.operands, token.clamp(min=0), **drawn_from.mask)
        return token, logprob


def start_fetch(*tensors: Tensor) -> Callable[[], list[list]]:
    """Start copying to the host; the result waits for the copies and returns their values.

    It does not wait for work launched on the device after this call.
    """
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    if not tensors[0].is_cuda:
        return lambda: [copy.tolist() for copy in copies]
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensors[0].device))

    def fetch() -> list[list]:
        copied.synchronize()
        return [copy.tolist() for copy in copies]

    return fetch


def not_finite(token_ids: list[int]) -> ValueError:
    return ValueError(f"the model's logits are not finite after the tokens ... {token_ids[-8:]}.")
