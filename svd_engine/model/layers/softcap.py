"""Soft cap of logits and attention scores, as in Gemma 2."""

import torch
from torch import Tensor


def softcapped(x: Tensor, softcap: float | None) -> Tensor:
    """Return softcap * tanh(x / softcap), or x where softcap is None."""
    return x if softcap is None else softcap * torch.tanh(x / softcap)
