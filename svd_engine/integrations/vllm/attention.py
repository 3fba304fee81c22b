"""Attention for two models at once: twice the heads, the base's first, in one cache.

Grouped-query attention keeps the two apart by itself, and the cache, its blocks and their prefixes
stay one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import Attention

# Backends that take the number of heads from the layers; others take it from the model.
BACKENDS = "CPU_ATTN", "FLASH_ATTN", "FLASHINFER", "TRITON_ATTN"
ROWS_OF_HEADS = "alibi_slopes", "sinks"  # arguments with a value for each head


class PairedAttention(Attention):
    """Takes rows of both models `[2N, heads, size]`, the base's first, and returns `[2N, out]`."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        side_by_side = (
            torch.cat((x[: len(x) // 2].flatten(1), x[len(x) // 2 :].flatten(1)), -1)
            for x in (query, key, value)
        )
        return torch.cat(super().forward(*side_by_side).chunk(2, -1))


@contextmanager
def paired() -> Iterator[None]:
    """Make every `Attention` that is built inside a `PairedAttention`.

    vLLM's models name the class themselves, and a layer tells vLLM of its cache while it is built.
    """
    original = Attention.__init__

    def init(
        self: Any, num_heads: int, head_size: int, scale: float,
        num_kv_heads: int | None = None, *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        _check(type(self) is Attention, f"its {type(self).__name__} is no plain attention")
        for name in ROWS_OF_HEADS:
            _check(kwargs.get(name) is None, f"its attention has {name}")
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        original(self, 2 * num_heads, head_size, scale, 2 * kv_heads, *args, **kwargs)
        self.__class__ = PairedAttention
        backend = self.attn_backend.get_name()
        if backend not in BACKENDS:
            raise ValueError(
                f"attention backend {backend} is not supported with steering, since it counts the "
                f"heads of one model. Set attention_backend to one of {', '.join(BACKENDS)}."
            )

    Attention.__init__ = init
    try:
        yield
    finally:
        Attention.__init__ = original


def check(layers: dict[str, Any]) -> None:
    """Raise ValueError if a layer with a state of its own is not paired."""
    for name, layer in layers.items():
        _check(isinstance(layer, PairedAttention), f"{name} is a {type(layer).__name__}")


def _check(fits: bool, reason: str) -> None:
    if not fits:
        raise ValueError(f"the model cannot be steered in vLLM: {reason}.")
