"""The contenders that the operators are measured against: steering written in plain PyTorch."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

STRENGTH, ALPHA = 3.0, 0.1


def eager(adapted: Tensor, base: Tensor) -> Tensor:
    """Compute (6)-(14) as the paper writes them."""
    p, q = adapted.float().softmax(-1), base.float().softmax(-1)
    gradient = -(torch.log(p / q) + 1)
    delta = p * (gradient - (p * gradient).sum(-1, keepdim=True))
    support = p >= ALPHA * p.amax(-1, keepdim=True)
    return torch.where(support, adapted + STRENGTH * delta, -math.inf).to(adapted.dtype)


def eager_difference(adapted: Tensor, base: Tensor) -> Tensor:
    """Compute the contrast of the two models as one would write it, with the mask."""
    z, b = adapted.float(), base.float()
    p = z.softmax(-1)
    support = p >= ALPHA * p.amax(-1, keepdim=True)
    contrast = (1 - STRENGTH) * z + STRENGTH * b
    contrast = contrast + STRENGTH * (p * (z - b)).sum(-1, keepdim=True)
    return torch.where(support, contrast, -math.inf).to(adapted.dtype)


def cancelled(adapted: Tensor, base: Tensor) -> Tensor:
    """Compute delta_i = p_i (E_p[d] - d_i) with d = adapted - base, and the mask on logits."""
    z = adapted.float()
    p, d = z.softmax(-1), z - base.float()
    delta = p * ((p * d).sum(-1, keepdim=True) - d)
    support = z >= z.amax(-1, keepdim=True) + math.log(ALPHA)
    return torch.where(support, z + STRENGTH * delta, -math.inf).to(adapted.dtype)


def compiled() -> Callable[[Tensor, Tensor], Tensor]:
    """Return `torch.compile` of `cancelled`, to be compiled for the first shape it is called with.

    Dynamo limits how often a function is compiled anew, so its caches are reset first.
    """
    torch.compiler.reset()
    return torch.compile(cancelled, dynamic=False, fullgraph=True)
