"""Choose a token for rows of different requests: operators take rows with the same options."""

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from svd_engine.generation.cutoffs import has_cutoffs
from svd_engine.generation.decode_loop import Batch
from svd_engine.generation.distribution import Distribution
from svd_engine.generation.outputs import Event
from svd_engine.generation.processed import is_plain
from svd_engine.generation.request import Request
from svd_engine.generation.sequence import Sequence
from svd_engine.generation.stream import Stream
from svd_engine.model.pair import PerModel


@dataclass(eq=False)
class Row:
    """A sequence that runs, and the stream that it belongs to. hidden: after its prompt."""

    sequence: Sequence
    stream: Stream
    hidden: PerModel = ()

    @property
    def request(self) -> Request:
        return self.stream.request

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to decode, or nobody reads it."""
        return self.sequence.is_finished or self.stream.is_cancelled


@torch.inference_mode()
def choose(rows: list[Row], logits: PerModel) -> list[Event | Exception]:
    """Append a token to each row's sequence. What fails in one request fails in no other.

    logits: of the adapted and the base model, `[rows, V]` each.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(_options(row.request), []).append(i)
    chosen: dict[int, Event | Exception] = {}
    for members in groups.values():
        part = logits
        if len(groups) > 1:
            index = torch.tensor(members, device=logits[0].device)
            part = tuple(x[index] for x in logits)
        group = Group([rows[i] for i in members])
        chosen.update(zip(members, group.choose(part), strict=True))
    return [chosen[i] for i in range(len(rows))]


def _options(request: Request) -> Hashable:
    """What rows of one operator call have in common."""
    if not is_plain(request) or has_cutoffs(request.sampling):
        return id(request)
    by, how = request.steering, request.sampling
    return (
        request.model, by.alpha, by.penalty, by.direction,
        how.temperature, how.top_k, how.top_p, how.min_p, how.top_logprobs,
    )  # fmt: skip


class Group(Batch):
    """Rows whose options are the same but for strength, seed and time.

    Another loop runs the models.
    """

    def __init__(self, rows: list[Row]) -> None:
        self.rows = [row.sequence for row in rows]
        self._requests = [row.request for row in rows]
        self._request = self._requests[0]  # whose options are those of all

    def choose(self, logits: PerModel) -> list[Event | Exception]:
        adapted, base = logits
        alone = {"steered": (adapted, base), "adapted": (adapted,), "base": (base,)}
        device = adapted.device
        self._seeds = torch.tensor([s.seed for s in self.rows], device=device)
        self._positions = torch.tensor([len(s.all_ids) for s in self.rows], device=device)
        try:
            tokens, logprobs, best = self._choose(alone[self._request.model])
        except Exception as error:  # of a logits processor
            return [error] * len(self.rows)
        is_over = [request.is_over for request in self._requests]
        chosen = zip(self.rows, tokens.tolist(), logprobs.tolist(), best, is_over, strict=True)
        return [self._append_or_fail(*row) for row in chosen]

    def _distribution(self, logits: PerModel, sequences: list[Sequence]) -> Distribution:
        drawn_from = super()._distribution(logits, sequences)
        strengths = [request.steering.strength for request in self._requests]
        if len(set(strengths)) == 1:
            return drawn_from
        adapted, base, _ = drawn_from.operands
        by_row = torch.tensor(strengths, device=adapted.device)
        return Distribution((adapted, base, by_row), drawn_from.mask)

    def _append_or_fail(self, *row) -> Event | Exception:
        try:
            return self._append(*row)
        except ValueError as error:
            return error
