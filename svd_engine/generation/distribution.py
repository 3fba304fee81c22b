"""The distribution that steering makes of the logits of both models, as the operators take it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from svd_engine import ops
from svd_engine.kernels import reference
from svd_engine.model.pair import PerModel
from svd_engine.steering_config import SteeringConfig


class Distribution(NamedTuple):
    """What tokens are drawn from, or scored under."""

    operands: tuple[Tensor, Tensor, float]  # adapted, base, strength
    mask: dict[str, Any]  # alpha, penalty


def steered(
    logits: PerModel, steering: SteeringConfig, penalty: float | None = None
) -> Distribution:
    """logits: of the adapted model and, last, of the base. penalty: in place of the steering's."""
    adapted, base, strength = logits[0], logits[-1], steering.strength
    mask = dict(alpha=steering.alpha, penalty=steering.penalty if penalty is None else penalty)
    if steering.projection:
        return Distribution((adapted, base, strength), mask)
    # The operators steer by the projection alone: formed here, the sum is drawn from as it is.
    formed = reference.steer(
        adapted, base, strength, **mask, direction="difference", dtype=torch.float32
    )
    return unsteered(formed)


def unsteered(logits: Tensor) -> Distribution:
    """Their softmax."""
    return Distribution((logits, logits, 0.0), dict(alpha=0.0))


def steered_logits(logits: PerModel, steering: SteeringConfig) -> Tensor:
    """float32 `[R, V]`."""
    drawn_from = steered(logits, steering)
    out = torch.empty_like(logits[0], dtype=torch.float32)
    return ops.steer(*drawn_from.operands, **drawn_from.mask, out=out)
