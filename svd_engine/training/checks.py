"""Checks of a warm start before any work: its options, and the folder it may write."""

import math
from pathlib import Path
from typing import Any

from svd_engine.utils.files import check_place

ADAPTER_FILE = "adapter_config.json"
# method -> learning rate of "auto", which changes the model visibly in about 30 steps
RATES = {"lora": 5e-4, "ia3": 5e-3, "prompt": 1e-2, "p-tuning": 1e-2, "prefix": 1e-2}
MOST = 2**31 - 1
MOST_OF = {"rank": 2**16, "virtual_tokens": 2**16, "seed": 2**32 - 1}


def options(
    *,
    method: str,
    learning_rate: float | str | None,
    dropout: float,
    epochs: float,
    lora_alpha: float,
    **counts: Any,
) -> float:
    """Return the learning rate, the method's own for "auto" and None.

    Raise ValueError for an option out of range; None in `counts` is unset.
    """
    if method not in RATES:
        raise ValueError(f"method must be one of {', '.join(RATES)}; got {method!r}.")
    if learning_rate in ("auto", None):
        learning_rate = RATES[method]
    for name, number in (("epochs", epochs), ("lora_alpha", lora_alpha)):
        if not 0 < number < math.inf:
            raise ValueError(f"{name} must be above 0 and finite; got {number}.")
    if not isinstance(learning_rate, int | float) or not 0 < learning_rate < math.inf:
        raise ValueError(
            f"learning_rate must be above 0 and finite, or 'auto'; got {learning_rate!r}."
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1); got {dropout}.")
    for name, count in counts.items():
        least, most = int(name != "seed"), MOST_OF.get(name, MOST)
        if count is not None and (not isinstance(count, int) or not least <= count <= most):
            raise ValueError(
                f"{name} must be an integer from {least} to {most}; got {str(count)[:80]}."
            )
    return learning_rate


def output(path: Path, overwrite: bool) -> None:
    """Raise ValueError unless an adapter may be put there."""
    if not path.name or path.name == "..":
        raise ValueError(f"output must name a folder of its own; got {str(path)!r}.")
    if path.exists() and not overwrite:
        raise ValueError(f"output {path} exists. Choose another folder or overwrite it.")
    if path.exists() and not (path / ADAPTER_FILE).is_file() and not _is_empty(path):
        raise ValueError(
            f"output {path} has no {ADAPTER_FILE}: it is no adapter and is not overwritten. "
            "Choose another folder."
        )
    check_place(path)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
