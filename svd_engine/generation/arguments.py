"""Token ids in arguments."""

from numbers import Integral
from typing import Any

from svd_engine.data.tokenization import located, token_ids


def ids(name: str, value: Any) -> list[int]:
    """One token id or several. Raises ValueError."""
    if isinstance(value, bool):
        raise ValueError(f"{name} must hold token ids; got {value!r}.")
    with located(name):
        found = token_ids([int(value)] if isinstance(value, Integral) else value)
    if any(one < 0 for one in found):
        raise ValueError(f"{name} must hold token ids; got {value!r}.")
    return found
