"""The arguments of the backends' own functions, from flat ones."""

import math

from torch import Tensor

from svd_engine.kernels.arguments import Draw, Mask


def per_row(value):
    return (0, value) if isinstance(value, Tensor) else (value, None)


def mask(strength, alpha=0.1, penalty=-math.inf):
    return Mask(per_row(strength), alpha, penalty)


def draw(temperature=0.0, seed=0, position=0, top_k=0, top_p=1.0, min_p=0.0):
    return Draw(temperature, top_k, top_p, min_p, per_row(seed), per_row(position))
