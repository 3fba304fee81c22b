"""What the operators are measured against: steering as one would write it in PyTorch."""

import math

import torch
from torch import Tensor

STRENGTH, ALPHA = 3.0, 0.1


def eager(adapted: Tensor, base: Tensor) -> Tensor:
    """(6)-(14) as the paper writes them."""
    p, q = adapted.float().softmax(-1), base.float().softmax(-1)
    gradient = -(torch.log(p / q) + 1)
    delta = p * (gradient - (p * gradient).sum(-1, keepdim=True))
    support = p >= ALPHA * p.amax(-1, keepdim=True)
    return torch.where(support, adapted + STRENGTH * delta, -math.inf).to(adapted.dtype)


def cancelled(adapted: Tensor, base: Tensor) -> Tensor:
    """delta_i = p_i (E_p[d] - d_i) with d = adapted - base, and the mask on logits."""
    z = adapted.float()
    p, d = z.softmax(-1), z - base.float()
    delta = p * ((p * d).sum(-1, keepdim=True) - d)
    support = z >= z.amax(-1, keepdim=True) + math.log(ALPHA)
    return torch.where(support, z + STRENGTH * delta, -math.inf).to(adapted.dtype)
