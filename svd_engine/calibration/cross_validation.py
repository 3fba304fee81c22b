"""The fits that a calibration chooses from: one alpha each."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from svd_engine.calibration import estimators
from svd_engine.calibration.estimators import BRACKET, GRID, HESSIANS
from svd_engine.calibration.objectives import Answers, Array
from svd_engine.calibration.support_stats import SupportStats
from svd_engine.utils import bootstrap


class AlphaFit:
    """One alpha: the losses under it, and the strength that a share of the examples asks for."""

    def __init__(
        self, alpha: float, answers: Answers, entries: SupportStats, objective: str,
        length_normalised: bool, estimator: str, hessian: str,
    ) -> None:  # fmt: skip
        self.alpha, self.entries = alpha, entries
        self.losses = answers.losses(entries, objective, length_normalised)
        self.nll = answers.losses(entries, "nll")
        self.curves = np.stack([self.losses(mu) for mu in GRID], axis=1)
        self.estimator, self.hessian = estimator, hessian
        right = answers.right_tokens(entries)
        self.owner = answers.example_of()[entries.passage.numpy()[right]]
        self.right, self.in_support = right, entries.in_support.numpy()[right]
        numerator, *denominators = (x.numpy()[right] for x in entries.projections())
        self.numerator = numerator
        self.denominators = dict(zip(HESSIANS, denominators, strict=True))

    def estimate(self, counts: NDArray) -> float:
        """The strength of the examples that `counts`, `[examples]`, repeats or leaves out."""
        if self.estimator == "exact":
            return self.optimum(counts)
        return float(np.clip(self._of_tokens(counts), -BRACKET, BRACKET))

    def optimum(self, counts: NDArray) -> float:
        return estimators.exact(self.losses, counts.astype(float), self.curves)

    def likeliest(self) -> float:
        curves = np.stack([self.nll(mu) for mu in GRID], axis=1)
        return estimators.exact(self.nll, np.ones(len(curves)), curves)

    def estimates(self) -> dict[str, float]:
        """Every estimator of (44)-(46) with either denominator, whatever the bracket."""
        return {
            f"{name} {hessian}": of_tokens(self.numerator, denominator)
            for name, of_tokens in estimators.FROM_TOKENS.items()
            for hessian, denominator in self.denominators.items()
        }

    def cost_if_right(self, strength: float) -> float:
        """What steering adds to the NLL of an example on average, were the adapted model right."""
        return float(self.entries.divergence(strength).numpy()[self.right].sum() / len(self.curves))

    def interval(self, draws: Array) -> tuple[float, float]:
        """95 % interval of the strength over resamples of the examples, `[draws, examples]`."""
        if self.estimator == "exact":
            return bootstrap.percentiles(GRID[(draws @ self.curves).argmin(1)])
        return bootstrap.percentiles(np.array([self.estimate(draw) for draw in draws]))

    def loss_of_fit(self, inside: NDArray[np.bool_], outside: NDArray[np.bool_]) -> float:
        """The loss of some examples at the strength of others, both to the nearest of GRID."""
        if self.estimator == "exact":
            nearest = (inside.astype(float) @ self.curves).argmin()
        else:
            nearest = np.abs(GRID - self._of_tokens(inside)).argmin()
        return float(self.curves[outside, nearest].sum())

    def _of_tokens(self, counts: NDArray) -> float:
        times = counts.astype(int)[self.owner]
        numerator = np.repeat(self.numerator, times)
        denominator = np.repeat(self.denominators[self.hessian], times)
        return estimators.FROM_TOKENS[self.estimator](numerator, denominator)


def held_out(
    candidates: Sequence[AlphaFit], fold: NDArray[np.int64], among: NDArray[np.bool_]
) -> Array:
    """The cross-validated loss of each candidate, summed over the examples `among`."""
    parts = [among & (fold == k) for k in np.unique(fold[among])]
    if len(parts) == 1:  # of two folds one is left: nothing to hold out
        return np.array([c.loss_of_fit(among, among) for c in candidates])
    return np.array([sum(c.loss_of_fit(among & ~part, part) for part in parts) for c in candidates])
