"""Two rows of logits to one, each by the choice of its request."""

import torch
from torch import Tensor

from svd_engine import ops
from svd_engine.integrations.vllm.requests import MODELS, Choice
from svd_engine.steering_config import Steering, SteeringConfig

BASE, ADAPTED, STEERED = range(len(MODELS))
FLOOR = 1e4  # exp(-1e4) is 0 in float32


class Rows:
    """The choices of the rows of a batch, as tensors; nothing to look at where all are steered."""

    def __init__(self, strength: float | Tensor, model: Tensor | None = None) -> None:
        self.strength, self.model = strength, model

    @classmethod
    def of(cls, choices: list[Choice], device: torch.device) -> "Rows":
        models, strengths = zip(*choices, strict=True) if choices else ((), ())
        one = len(set(strengths)) == 1
        strength = (
            strengths[0] if one else torch.tensor(strengths, dtype=torch.float32, device=device)
        )
        if set(models) <= {STEERED}:
            return cls(strength)
        return cls(strength, torch.tensor(models, device=device))


class SteeredLogits:
    """What `compute_logits` makes of two rows: `next` says how, and is used up by one call.

    vLLM's calls without it are about tokens of a prompt: they are scored as `SteeredEngine.score`
    does, with the strength for ranking and no penalty off the support.
    """

    def __init__(self, steering: Steering) -> None:
        self.default = steering.generation  # of requests; None: the adapted model
        self.ranking = steering.ranking
        self.next: Rows | None = None

    def take(self) -> Rows | None:
        rows, self.next = self.next, None
        return rows

    def combine(self, adapted: Tensor, base: Tensor, rows: Rows | None) -> Tensor:
        """Return float32 logits `[N, V]`, which are finite wherever those of the models are."""
        if rows is None:
            return self._score(adapted, base)
        config = self.default or SteeringConfig(0.0)
        out = torch.empty_like(adapted, dtype=torch.float32)
        ops.steer(
            adapted, base, rows.strength, alpha=config.alpha, penalty=config.penalty,
            direction=config.direction, out=out,
        )  # fmt: skip
        # What masks the whole support afterwards, a grammar or min_tokens, finds the order of the
        # adapted model below it.
        out = torch.where(out == -torch.inf, adapted.float() - FLOOR, out)
        if rows.model is None:
            return out
        model = rows.model[:, None]
        out = torch.where(model == ADAPTED, adapted.float(), out)
        return torch.where(model == BASE, base.float(), out)

    def _score(self, adapted: Tensor, base: Tensor) -> Tensor:
        config = self.ranking
        if config is None:
            return adapted.float()
        out = torch.empty_like(adapted, dtype=torch.float32)
        return ops.steer(
            adapted, base, config.strength, alpha=config.alpha, penalty=0.0,
            direction=config.direction, out=out,
        )  # fmt: skip
