"""What a checked call hands to every backend: `Mask` and `Draw`, packed once and passed whole.

Fields hold what the caller gave. Where kernels take something else, it is derived here alone.
"""

import functools
import math
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from . import reference

INF = math.inf
EVERY_TOKEN = 2**31 - 1  # as top_k
NO_CUTS = (EVERY_TOKEN, INF, -INF)

Number = TypeVar("Number", int, float)
# One number for all rows or, where there is a tensor `[N]`, one for each.
PerRow = tuple[Number, Tensor | None]

log_alpha = functools.lru_cache(maxsize=64)(reference.log_alpha)
named = tuple.__new__  # named(Mask, (...)) takes a third of the time of Mask(...)


class Mask(NamedTuple):
    """How far the tokens of the support are steered, and what becomes of the others."""

    strength: PerRow[float]
    alpha: float
    penalty: float

    @property
    def removes(self) -> bool:
        """Whether tokens off the support are removed."""
        return self.penalty == -INF


class Draw(NamedTuple):
    """How a token is drawn from the steered distribution."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: PerRow[int]
    position: PerRow[int]

    @property
    def is_cut(self) -> bool:
        """Whether cuts can change the choice; they keep the greedy token, the coldest choice."""
        if self.temperature < reference.COLDEST:
            return False
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def cuts(self) -> tuple[int, float, float]:
        """top_k, top_p and log(min_p), in which `EVERY_TOKEN`, inf and -inf cut nothing."""
        if not self.is_cut:
            return NO_CUTS
        return (
            min(self.top_k, EVERY_TOKEN) or EVERY_TOKEN,
            self.top_p if self.top_p < 1 else INF,
            math.log(self.min_p) if self.min_p else -INF,
        )


def keywords(packed: Mask | Draw) -> dict[str, Any]:
    """The fields as keyword arguments of the functions of `reference`."""
    return {name: _unpaired(value) for name, value in packed._asdict().items()}


def _unpaired(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    shared, each = value
    return shared if each is None else each
