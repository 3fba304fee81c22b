"""All that a strength needs to know of a text: the steering vector on each token's support.

The support of a position is a handful of tokens, so after one pass of both models over the data the
log-probability of every target at every strength costs nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svd_engine.branches import Branches
from svd_engine.kernels import reference
from svd_engine.teacher import Passage, predictions


@dataclass
class Supports:
    """T target tokens of some passages; the support entries of all of them lie in one list of K.

    All float64. Steering follows the penalty 0 of scoring: off the support logits stay as they are.
    """

    position: Tensor  # [K] int64, the target token that an entry belongs to
    p: Tensor  # [K] adapted probability
    delta: Tensor  # [K] steering vector
    passage: Tensor  # [T] int64, index of the passage
    adapted: Tensor  # [T] log p of the target
    base: Tensor  # [T] log q of the target
    target_delta: Tensor  # [T] delta of the target, 0 off the support
    in_support: Tensor  # [T] bool

    def logprob(self, strength: float) -> Tensor:
        """log P_hat of every target token, `[T]`."""
        gained = torch.zeros_like(self.adapted).index_add_(
            0, self.position, self.p * torch.expm1(strength * self.delta)
        )
        # Above -1 by its meaning, not always by its rounding.
        return self.adapted + strength * self.target_delta - gained.clamp(-1 + 1e-15).log1p()

    def totals(self, values: Tensor, passages: int) -> Tensor:
        """Sum of `[T]` values over the tokens of each passage, `[passages]`."""
        return torch.zeros(passages, dtype=values.dtype).index_add_(0, self.passage, values)

    def projections(self) -> tuple[Tensor, Tensor]:
        """Numerator and Gauss-Newton denominator of (20), `[T]` each."""

        def total(entries: Tensor) -> Tensor:
            return torch.zeros_like(self.adapted).index_add_(0, self.position, entries)

        return self.target_delta - total(self.p * self.delta), total(self.delta.square())

    def support_sizes(self) -> Tensor:
        """Tokens in the support of each position, `[T]`."""
        return torch.bincount(self.position, minlength=len(self.adapted))


@torch.inference_mode()
def collect(
    pair: Branches, passages: Sequence[Passage], alpha: float, progress: str | None = None
) -> Supports:
    """One pass of both models over the passages; memory grows with the supports, not with V.

    alpha must be above 0: without a mask every support is the whole vocabulary.
    """
    if not 0 < alpha <= 1:
        raise ValueError(
            f"alpha must lie in (0, 1] to calibrate; got {alpha}. A small one, such as 0.001, "
            "keeps nearly every token that matters."
        )
    parts: list[list[Tensor]] = []
    seen = 0
    for (adapted, base), target, passage in predictions(pair, passages, progress):
        support = reference.support(adapted, base, alpha)
        hit = support.token == target[support.row]
        on_target = torch.zeros(len(target), dtype=torch.float64, device=target.device)
        on_target[support.row[hit]] = support.delta[hit].double()
        inside = torch.zeros_like(target, dtype=torch.bool)
        inside[support.row[hit]] = True
        logprobs = (
            x.float().log_softmax(-1).gather(-1, target[:, None])[:, 0] for x in (adapted, base)
        )
        parts.append(
            [
                support.row + seen, support.p.double(), support.delta.double(), passage,
                *(x.double() for x in logprobs), on_target, inside,
            ]
        )  # fmt: skip
        seen += len(target)
    return Supports(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))
