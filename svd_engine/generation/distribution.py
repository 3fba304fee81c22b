"""The distribution that steering makes of the logits of both models, as the operators take it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from svd_engine import ops
from svd_engine.model.pair import PerModel
from svd_engine.steering_config import SteeringConfig


class Distribution(NamedTuple):
    """What tokens are drawn from, or scored under."""

    operands: tuple[Tensor, Tensor, float | Tensor]  # adapted, base, strength
    mask: dict[str, Any]  # alpha, penalty, direction


def steered(
    logits: PerModel, steering: SteeringConfig, penalty: float | None = None
) -> Distribution:
    """logits: of the adapted model and, last, of the base. penalty: in place of the steering's."""
    mask = dict(
        alpha=steering.alpha,
        penalty=steering.penalty if penalty is None else penalty,
        direction=steering.direction,
    )
    return Distribution((logits[0], logits[-1], steering.strength), mask)


def unsteered(logits: Tensor) -> Distribution:
    """Their softmax."""
    return Distribution((logits, logits, 0.0), dict(alpha=0.0))


def steered_logits(logits: PerModel, steering: SteeringConfig) -> Tensor:
    """float32 `[R, V]`."""
    drawn_from = steered(logits, steering)
    out = torch.empty_like(logits[0], dtype=torch.float32)
    return ops.steer(*drawn_from.operands, **drawn_from.mask, out=out)
