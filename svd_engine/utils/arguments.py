"""Checks of single arguments: each returns the value in its plain form, or raises ValueError."""

import math
from numbers import Integral, Real
from reprlib import repr as short  # of what may be long or deep
from typing import Any

MOST = 2**31 - 1  # of everything that is counted


def count(name: str, value: Any, least: int = 0, most: int = MOST) -> int:
    """An integer of at least `least`, of Python or NumPy."""
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or not least <= int(value) <= most:
        raise ValueError(f"{name} must be an integer from {least} to {most}; got {short(value)}.")
    return int(value)


def number(name: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number; got {short(value)}.")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite; got {value!r}.")
    return float(value)
