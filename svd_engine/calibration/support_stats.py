"""Sparse statistics of each target token, enough to evaluate its log-probability at any strength.

The support of a position is a handful of tokens: one pass of both models over the data collects the
steering vector there, and evaluating every target at another strength then costs almost nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from svd_engine import ops
from svd_engine.generation.scoring import Passage, Predictions, predictions
from svd_engine.kernels.reference import Support
from svd_engine.model.pair import ModelPair

MERGED = 128  # entries of a token's support that `merged` leaves
MOST = 50_000_000  # entries of all supports, 25 bytes each


@dataclass(frozen=True)
class SupportStats:
    """The statistics of T target tokens; their support entries form one list of K entries.

    Values are float64. The penalty is 0, as in scoring: logits off the support do not change.
    """

    position: Tensor  # [K] int64, the target token that an entry belongs to
    p: Tensor  # [K] adapted probability
    delta: Tensor  # [K] steering vector
    on_target: Tensor  # [K] bool, the entry is the target itself
    passage: Tensor  # [T] int64, index of the passage
    adapted: Tensor  # [T] log p of the target
    base: Tensor  # [T] log q of the target

    @cached_property
    def target_delta(self) -> Tensor:
        """delta of each target, 0 off the support, `[T]`."""
        return self._per_token(self.delta * self.on_target)

    @cached_property
    def in_support(self) -> Tensor:
        """Whether each target lies in its support, `[T]` bool."""
        return self._per_token(self.on_target.double()) > 0

    def logprob(self, strength: float) -> Tensor:
        """log P_hat of every target token, `[T]`."""
        moved = strength * self.delta
        if not len(moved) or moved.max() < 100:
            gained = self._per_token(self.p * torch.expm1(moved))
            # A probability minus 1: never below -1, except by rounding.
            normaliser = gained.clamp(-1 + 1e-15).log1p()
        else:  # relative to the maximum, since the exponentials would overflow
            top = torch.zeros_like(self.adapted)
            top.scatter_reduce_(0, self.position, moved, "amax")
            kept = self._per_token(self.p * torch.exp(moved - top[self.position]))
            left = (1 - self._per_token(self.p)).clamp(0) * torch.exp(-top)
            normaliser = top + (kept + left).log()
        return self.adapted + strength * self.target_delta - normaliser

    def divergence(self, strength: float) -> Tensor:
        """KL(p || P_hat) at every position, `[T]`: the cost of steering if the model is right."""
        mean = self._per_token(self.p * self.delta)
        return -(self.logprob(strength) - self.adapted - strength * (self.target_delta - mean))

    def totals(self, values: Tensor, passages: int) -> Tensor:
        """Sum `[T]` values over the tokens of each passage, `[passages]`."""
        return torch.zeros(passages, dtype=values.dtype).index_add_(0, self.passage, values)

    def projections(self) -> tuple[Tensor, Tensor, Tensor]:
        """Numerator, Gauss-Newton denominator (20) and Newton denominator (19), `[T]` each."""
        mean = self._per_token(self.p * self.delta)
        # Tokens off the support have delta 0 and share the remaining probability.
        left = (1 - self._per_token(self.p)).clamp(0)
        apart = self.delta - mean[self.position]
        newton = self._per_token(self.p * apart.square()) + left * mean.square()
        return self.target_delta - mean, self._per_token(self.delta.square()), newton

    def support_sizes(self) -> Tensor:
        """The number of tokens in the support of each position, `[T]`."""
        return torch.bincount(self.position, minlength=len(self.adapted))

    def at(self, alpha: float) -> "SupportStats":
        """Restrict the supports to those of a larger alpha."""
        top = torch.zeros_like(self.adapted).scatter_reduce_(0, self.position, self.p, "amax")
        kept = self.p >= alpha * top[self.position]
        entries = {name: getattr(self, name)[kept] for name in ("position", "p", "delta")}
        return replace(self, **entries, on_target=self.on_target[kept])

    def along(self, direction: str) -> "SupportStats":
        """Replace delta (10) by that of a direction: the difference is delta / p."""
        return self if direction == "projected" else replace(self, delta=self.delta / self.p)

    def merged(self) -> "SupportStats":
        """Merge the entries of large supports that have nearly the same delta; targets stay.

        The result has at most MERGED entries per token, so that flat distributions cost little more
        than peaked ones. It is for log-probabilities: sums of p and of p * delta are exact.
        """
        large = self.support_sizes() > MERGED
        entries = large[self.position] & ~self.on_target
        if not entries.any():
            return self
        row, p, delta = self.position[entries], self.p[entries], self.delta[entries]
        low = torch.full_like(self.adapted, torch.inf).scatter_reduce_(0, row, delta, "amin")
        high = torch.full_like(self.adapted, -torch.inf).scatter_reduce_(0, row, delta, "amax")
        width = (high - low).clamp(torch.finfo(delta.dtype).tiny)[row]
        place = ((delta - low[row]) / width * (MERGED - 2)).long()
        place += (large.cumsum(0) - 1)[row] * MERGED
        mass, moment = torch.zeros(2, int(large.sum()) * MERGED, dtype=p.dtype)
        mass.index_add_(0, place, p)
        moment.index_add_(0, place, p * delta)
        full = mass > 0
        rows = large.nonzero()[:, 0].repeat_interleave(MERGED)[full]
        return replace(
            self,
            position=torch.cat([self.position[~entries], rows]),
            p=torch.cat([self.p[~entries], mass[full]]),
            delta=torch.cat([self.delta[~entries], (moment / mass)[full]]),
            on_target=torch.cat(
                [self.on_target[~entries], torch.zeros_like(rows, dtype=torch.bool)]
            ),
        )

    def _per_token(self, entries: Tensor) -> Tensor:
        return torch.zeros_like(self.adapted).index_add_(0, self.position, entries)


@torch.inference_mode()
def collect(
    pair: ModelPair, passages: Sequence[Passage], alpha: float, progress: str | None = None
) -> SupportStats:
    """Run both models once over the passages; memory grows with the supports, not with V.

    alpha must be above 0: at 0 every support is the whole vocabulary. Raises ValueError.
    """
    if not 0 < alpha <= 1:
        raise ValueError(
            f"alpha must lie in (0, 1] to calibrate; got {alpha}. A small one, such as 0.001, "
            "keeps nearly every token that matters."
        )
    return gather(predictions(pair, passages, progress), alpha)


def gather(predicted: Iterable[Predictions], alpha: float) -> SupportStats:
    """Collect the supports of both models' predictions. Raises ValueError."""
    parts: list[list[Tensor]] = []
    seen = kept = 0
    for logits, target, passage in predicted:
        listed = Support(
            *(x.cpu() for x in ops.support(logits[0], logits[-1], target, alpha=alpha))
        )
        unpredicted = passage[~listed.logp.isfinite()]
        if len(unpredicted):
            raise ValueError(
                f"passage {int(unpredicted[0])} holds a token that the adapted model cannot "
                "predict: its logits are not finite there."
            )
        row, slot = (listed.token >= 0).nonzero().T
        token, p, delta = (x[row, slot] for x in listed[:3])
        entries = [
            row + seen, p.double(), delta.double(), token == target.cpu()[row], passage,
            listed.logp.double(), listed.logq.double(),
        ]  # fmt: skip
        parts.append(entries)
        seen, kept = seen + len(target), kept + len(p)
        if kept > MOST:
            raise ValueError(
                f"the supports at alpha = {alpha} hold {kept // seen} tokens on average, too many "
                "to keep. Are the adapted model's texts as they should be? A larger alpha keeps "
                "fewer tokens."
            )
    return SupportStats(*(torch.cat(column) for column in zip(*parts, strict=True)))
