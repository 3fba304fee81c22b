"""One fit per candidate objective, direction and alpha; cross-validation picks among them."""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from svd_engine.calibration import estimators
from svd_engine.calibration.estimators import BRACKET, GRID, HESSIANS
from svd_engine.calibration.objectives import Answers, Array
from svd_engine.calibration.options import CalibrationOptions, Candidate
from svd_engine.calibration.support_stats import SupportStats
from svd_engine.calibration.verdict import NLL_ALLOWED
from svd_engine.utils import bootstrap

ZERO = len(GRID) // 2  # strength 0


class Steered:
    """Every answer's log-probability along one direction, at one alpha and any strength."""

    def __init__(
        self,
        answers: Answers,
        stats: SupportStats,
        direction: str,
        alpha: float,
        tick: Callable[[], object],
    ) -> None:
        stats = stats.at(alpha).along(direction)
        right = answers.right_tokens(stats)
        self.answers = answers
        self.owner = answers.example_of()[stats.passage.numpy()[right]]
        self.right, self.in_support = right, stats.in_support.numpy()[right]
        self.single_share = float((stats.support_sizes() == 1).double().mean())
        numerator, *denominators = (x.numpy()[right] for x in stats.projections())
        self.numerator = numerator
        self.denominators = dict(zip(HESSIANS, denominators, strict=True))
        self.stats = stats.merged()
        self.on_grid: list[Array] = []
        self.known: dict[tuple[str, bool], Array] = {}
        for strength in GRID:
            self.on_grid.append(answers.scores(self.stats, strength))
            tick()

    def curves(self, objective: str, length_normalised: bool) -> Array:
        """The loss of every example at every point of GRID, `[examples, len(GRID)]`."""
        key = objective, length_normalised
        if key not in self.known:
            losses = self.answers.losses_of(lambda point: self.on_grid[int(point)], *key)
            self.known[key] = np.stack([losses(point) for point in range(len(GRID))], axis=1)
        return self.known[key]


class Fit:
    """The losses of one candidate, and the strength that any part of the examples asks for."""

    def __init__(self, candidate: Candidate, steered: Steered, options: CalibrationOptions) -> None:
        answers, stats = steered.answers, steered.stats
        fitted = candidate.objective, candidate.length_normalised
        self.candidate, self.steered = candidate, steered
        self.losses = answers.losses(stats, *fitted)
        self.curves = steered.curves(*fitted)
        self.measured = answers.losses(stats, *options.measure)
        self.measured_curves = steered.curves(*options.measure)
        self.nll = answers.losses(stats, "nll")
        self.nll_curves = steered.curves("nll", False)
        self.estimator, self.hessian = options.estimator, options.hessian
        self.allowed = answers.tokens() * (NLL_ALLOWED if options.guards_choice else np.inf)

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
        return estimators.exact(self.nll, np.ones(len(self.nll_curves)), self.nll_curves)

    def estimates(self) -> dict[str, float]:
        """Every estimator of (44)-(46) with either denominator, not clipped to the bracket."""
        return {
            f"{name} {hessian}": of_tokens(self.steered.numerator, denominator)
            for name, of_tokens in estimators.FROM_TOKENS.items()
            for hessian, denominator in self.steered.denominators.items()
        }

    def cost_if_right(self, strength: float) -> float:
        """The mean NLL per example that steering adds if the adapted model is right."""
        divergence = self.steered.stats.divergence(strength).numpy()
        return float(divergence[self.steered.right].sum() / len(self.curves))

    def interval(self, draws: Array) -> tuple[float, float]:
        """95 % interval of the strength over resamples of the examples, `[draws, examples]`."""
        if self.estimator == "exact":
            return bootstrap.percentiles(GRID[estimators.best_points(draws, self.curves)])
        return bootstrap.percentiles(np.array([self.estimate(draw) for draw in draws]))

    def nearest(self, inside: NDArray[np.bool_]) -> int:
        """The point of GRID that is nearest to the strength of these examples."""
        if self.estimator == "exact":
            return int(estimators.best_points(inside.astype(float), self.curves))
        return int(np.abs(GRID - self._of_tokens(inside)).argmin())

    def held_out(
        self, parts: Sequence[NDArray[np.bool_]], among: NDArray[np.bool_]
    ) -> tuple[float, float]:
        """Loss, and change of the NLL by steering, of the examples `among`.

        Those of each part have the strength of the other parts.
        """
        loss = nll_change = 0.0
        for part in parts:
            # One of two folds leaves nothing to hold out.
            point = self.nearest(among & ~part if len(parts) > 1 else among)
            loss += float(self.measured_curves[part, point].sum())
            nll_change += float((self.nll_curves[part, point] - self.nll_curves[part, ZERO]).sum())
        return loss, nll_change

    def _of_tokens(self, counts: NDArray) -> float:
        times = counts.astype(int)[self.steered.owner]
        numerator = np.repeat(self.steered.numerator, times)
        denominator = np.repeat(self.steered.denominators[self.hessian], times)
        return estimators.FROM_TOKENS[self.estimator](numerator, denominator)


def fits(
    answers: Answers,
    stats: SupportStats,
    options: CalibrationOptions,
    tick: Callable[[], object] = lambda: None,
) -> list[Fit]:
    """Fit every candidate from one pass. tick: called at each point of GRID."""

    @cache
    def steered(direction: str, alpha: float) -> Steered:
        return Steered(answers, stats, direction, alpha, tick)

    return [Fit(c, steered(c.direction, c.alpha), options) for c in options.candidates()]


def held_out(fits: Sequence[Fit], fold: NDArray[np.int64], among: NDArray[np.bool_]) -> Array:
    """Loss and change of the NLL of each fit, `[fits, 2]`, cross-validated over `among`."""
    parts = [among & (fold == k) for k in np.unique(fold[among])]
    return np.array([fit.held_out(parts, among) for fit in fits])


def best_fit(fits: Sequence[Fit], fold: NDArray[np.int64], among: NDArray[np.bool_]) -> Fit:
    """The fit with the smallest cross-validated loss over the examples `among`.

    Where the likelihood is guarded, fits under which it falls come last.
    """
    losses, nll_changes = held_out(fits, fold, among).T
    falls = nll_changes > [fit.allowed[among].sum() for fit in fits]
    return fits[int(np.lexsort((losses, np.where(falls, nll_changes, 0.0)))[0])]
