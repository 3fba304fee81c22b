"""One fit per candidate alpha; cross-validation picks among them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from svd_engine.calibration import estimators
from svd_engine.calibration.estimators import BRACKET, GRID, HESSIANS
from svd_engine.calibration.objectives import Answers, Array
from svd_engine.calibration.options import CalibrationOptions
from svd_engine.calibration.support_stats import SupportStats
from svd_engine.utils import bootstrap


class AlphaFit:
    """The losses under one alpha, and the strength that any part of the examples asks for."""

    def __init__(
        self, alpha: float, answers: Answers, stats: SupportStats, options: CalibrationOptions
    ) -> None:
        stats = stats.at(alpha) if options.projection else stats.at(alpha).unprojected()
        self.alpha, self.stats = alpha, stats
        self.losses = answers.losses(stats, options.objective, options.length_normalised)
        self.nll = answers.losses(stats, "nll")
        self.curves = np.stack([self.losses(strength) for strength in GRID], axis=1)
        self.estimator, self.hessian = options.estimator, options.hessian
        right = answers.right_tokens(stats)
        self.owner = answers.example_of()[stats.passage.numpy()[right]]
        self.right, self.in_support = right, stats.in_support.numpy()[right]
        numerator, *denominators = (x.numpy()[right] for x in stats.projections())
        self.numerator = numerator
        self.denominators = dict(zip(HESSIANS, denominators, strict=True))

    def estimate(self, counts: NDArray) -> float:
        """The strength of the examples; `counts`, `[examples]`, says how often each one counts."""
        if self.estimator == "exact":
            return self.optimum(counts)
        return float(np.clip(self._of_tokens(counts), -BRACKET, BRACKET))

    def optimum(self, counts: NDArray) -> float:
        """The strength that minimises the objective."""
        return estimators.exact(self.losses, counts.astype(float), self.curves)

    def likeliest(self) -> float:
        """The strength that maximises the likelihood of all right answers."""
        curves = np.stack([self.nll(strength) for strength in GRID], axis=1)
        return estimators.exact(self.nll, np.ones(len(curves)), curves)

    def estimates(self) -> dict[str, float]:
        """Every estimator of (44)-(46) with either denominator, not clipped to the bracket."""
        return {
            f"{name} {hessian}": of_tokens(self.numerator, denominator)
            for name, of_tokens in estimators.FROM_TOKENS.items()
            for hessian, denominator in self.denominators.items()
        }

    def cost_if_right(self, strength: float) -> float:
        """The mean NLL per example that steering adds if the adapted model is right."""
        return float(self.stats.divergence(strength).numpy()[self.right].sum() / len(self.curves))

    def interval(self, draws: Array) -> tuple[float, float]:
        """95 % interval of the strength over resamples of the examples, `[draws, examples]`."""
        if self.estimator == "exact":
            return bootstrap.percentiles(GRID[estimators.best_points(draws, self.curves)])
        return bootstrap.percentiles(np.array([self.estimate(draw) for draw in draws]))

    def loss_of_fit(self, inside: NDArray[np.bool_], outside: NDArray[np.bool_]) -> float:
        """The loss of the examples `outside` at the strength of `inside`, rounded to GRID."""
        if self.estimator == "exact":
            nearest = int(estimators.best_points(inside.astype(float), self.curves))
        else:
            nearest = int(np.abs(GRID - self._of_tokens(inside)).argmin())
        return float(self.curves[outside, nearest].sum())

    def _of_tokens(self, counts: NDArray) -> float:
        times = counts.astype(int)[self.owner]
        numerator = np.repeat(self.numerator, times)
        denominator = np.repeat(self.denominators[self.hessian], times)
        return estimators.FROM_TOKENS[self.estimator](numerator, denominator)


def held_out_losses(
    fits: Sequence[AlphaFit], fold: NDArray[np.int64], among: NDArray[np.bool_]
) -> Array:
    """The cross-validated loss of each fit, summed over the examples `among`."""
    parts = [among & (fold == k) for k in np.unique(fold[among])]
    if len(parts) == 1:  # one of two folds: nothing is left to hold out
        return np.array([f.loss_of_fit(among, among) for f in fits])
    return np.array([sum(f.loss_of_fit(among & ~part, part) for part in parts) for f in fits])


def best_fit(
    fits: Sequence[AlphaFit], fold: NDArray[np.int64], among: NDArray[np.bool_]
) -> AlphaFit:
    """The fit with the smallest cross-validated loss over the examples `among`."""
    return fits[int(np.argmin(held_out_losses(fits, fold, among)))]
