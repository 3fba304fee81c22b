"""The head of a language model, from whose hidden states the `linear_*` operators start."""

from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """A language model head: hidden `[N, H]` -> logits `[N, V]`."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    scale: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """`softcapped` of scale * (hidden @ weight^T + bias)."""
        x = torch.nn.functional.linear(hidden, self.weight, self.bias) * self.scale
        return softcapped(x, self.softcap)


def softcapped(x: Tensor, softcap: float | None) -> Tensor:
    """Return softcap * tanh(x / softcap), as in Gemma 2, or x where softcap is None."""
    return x if softcap is None else softcap * torch.tanh(x / softcap)
