"""What a checked call hands to every backend, packed once: `Mask`, `Draw` and the `PerRow` in them.

The fields are what the caller gave; what kernels take in their place is derived here alone.
"""

import functools
import math
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from . import reference

INF = math.inf
EVERY_TOKEN = 2**31 - 1  # as top_k
NO_CUTS = (EVERY_TOKEN, INF, -INF)

Number = TypeVar("Number", int, float)
log_alpha = functools.lru_cache(maxsize=64)(reference.log_alpha)


class PerRow(NamedTuple, Generic[Number]):
    """A tensor `[N]` with a number for each row or, where that is None, one number for all."""

    shared: Number
    each: Tensor | None = None

    @property
    def value(self) -> Number | Tensor:
        return self.shared if self.each is None else self.each


class Mask(NamedTuple):
    """How far the tokens of the support are steered, and what becomes of the others."""

    strength: PerRow[float]
    alpha: float
    penalty: float

    @property
    def log_alpha(self) -> float:
        return log_alpha(self.alpha)

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
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

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
    """The fields as the functions of `reference` take them."""
    return {
        name: value.value if isinstance(value, PerRow) else value
        for name, value in packed._asdict().items()
    }
