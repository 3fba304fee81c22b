"""Checks of a warm start before any work: its options, and the folder it may write."""

import math
from pathlib import Path
from typing import Any, TypeGuard

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from svd_engine.utils.arguments import MOST, count
from svd_engine.utils.files import check_place

ADAPTER_FILE = "adapter_config.json"
# method -> learning rate of "auto", which changes the model visibly in about 30 steps
RATES = {"lora": 5e-4, "ia3": 5e-3, "prompt": 1e-2, "p-tuning": 1e-2, "prefix": 1e-2}
MOST_OF = {"rank": 2**16, "virtual_tokens": 2**16, "seed": 2**32 - 1}
MAY_BE_UNSET = ("steps",)


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
    for name, value in (("epochs", epochs), ("lora_alpha", lora_alpha)):
        if not _is_number(value) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0 and finite; got {value!r}.")
    if not _is_number(learning_rate) or not 0 < learning_rate < math.inf:
        raise ValueError(
            f"learning_rate must be above 0 and finite, or 'auto'; got {learning_rate!r}."
        )
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1); got {dropout!r}.")
    for name, value in counts.items():
        if value is not None or name not in MAY_BE_UNSET:
            count(name, value, int(name != "seed"), MOST_OF.get(name, MOST))
            if not isinstance(value, int):  # it is written as JSON, at the end by PEFT
                raise ValueError(f"{name} must be a Python integer; got {value!r}.")
    return learning_rate


def loaded(model: object, tokenizer: object) -> None:
    """Raise ValueError unless they are a model and a tokenizer of transformers."""
    for name, value, kind in (
        ("model", model, PreTrainedModel), ("tokenizer", tokenizer, PreTrainedTokenizerBase),
    ):  # fmt: skip
        if not isinstance(value, kind):
            raise ValueError(
                f"{name} must be one of transformers; got {value!r}. svd_engine.loading.load_base "
                "loads both."
            )


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


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
