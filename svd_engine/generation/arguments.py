"""Checks of single arguments: each returns the value in its plain form, or raises ValueError."""

import math
from numbers import Integral, Real
from typing import Any

from svd_engine.data.tokenization import located, token_ids

MOST = 2**31 - 1  # of everything that is counted


def count(name: str, value: Any, least: int = 0) -> int:
    """An integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
        raise ValueError(f"{name} must be an integer from {least} to {MOST}; got {value!r}.")
    return value


def number(name: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number; got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite; got {value!r}.")
    return float(value)


def ids(name: str, value: Any) -> list[int]:
    """One token id or several."""
    if isinstance(value, bool):
        raise ValueError(f"{name} must hold token ids; got {value!r}.")
    with located(name):
        found = token_ids([int(value)] if isinstance(value, Integral) else value)
    if any(one < 0 for one in found):
        raise ValueError(f"{name} must hold token ids; got {value!r}.")
    return found
