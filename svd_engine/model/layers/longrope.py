"""Rotary frequencies that depend on the length of a text, chosen for each row by its own length.

transformers chooses them by the longest row of a batch.
"""

import copy
import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

NAME = "longrope"


def changes(config: Any, start: int, total: int) -> bool:
    """Whether a text of `total` tokens has other frequencies than its first `start` tokens alone.

    What a KV cache holds of these tokens is then of no use.
    """
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    if kind == "dynamic":  # they change with every token beyond the limit
        return total > config.max_position_embeddings
    return kind == NAME and start <= rope["original_max_position_embeddings"] < total


def check_constant(name: str, config: Any, start: int, total: int) -> None:
    """Raise ValueError where the frequencies change while a text grows from `start` to `total`."""
    if changes(config, start, total):
        rope = config.get_text_config().rope_parameters
        limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        raise ValueError(
            f"{name} grows from {start} to {total} tokens; beyond {limit} the model has other "
            f"rotary frequencies ({rope['rope_type']}). Stay within {limit} tokens"
            + (f", or begin with more than {limit}." if rope["rope_type"] == NAME else ".")
        )


def choose_per_row(module: nn.Module) -> None:
    """Let a rotary embedding of the kind `longrope` choose for each row."""
    if getattr(module, "rope_type", None) != NAME:
        return
    config: Any = module.config
    limit = config.rope_parameters["original_max_position_embeddings"]
    long, _ = ROPE_INIT_FUNCTIONS[NAME](config, module.inv_freq.device, seq_len=limit + 1)  # type: ignore
    module.longrope_limit = limit  # type: ignore[assignment]
    variants = []
    for frequencies in (module.original_inv_freq, long):
        variant = copy.copy(module)
        variant._buffers = {**module._buffers, "inv_freq": frequencies}  # type: ignore[dict-item]
        variants.append(variant)
    module.__dict__["longrope_variants"] = variants  # no submodules
    module.__class__ = _per_row(type(module))  # type: ignore[arg-type]


@functools.cache
def _per_row(cls: type[nn.Module]) -> type[nn.Module]:
    plain = inspect.unwrap(cls.forward)  # without the choice by the longest row

    def forward(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        short, long = (plain(variant, x, position_ids) for variant in self.longrope_variants)  # type: ignore
        is_long = position_ids.amax(-1)[:, None, None] >= self.longrope_limit  # type: ignore[operator]
        return tuple(torch.where(is_long, b, a) for a, b in zip(short, long, strict=True))

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
