"""Estimators of one strength: the exact optimum of the losses, and the paper's (44)-(46).

For one token, numerator / denominator is the Newton step that raises its likelihood: (20) with the
Gauss-Newton denominator, (19) with the Newton one. The paper combines the steps of many tokens:

    mean     of the ratios                                     (44)
    median   of the ratios, or their trimmed mean              (45)
    ratio    sum of numerators / sum of denominators           (46)
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from svd_engine.calibration.objectives import Array, Losses

BRACKET = 64.0  # no |mu| beyond it is tried
TRIM = 0.1  # share of the ratios cut at either end
EPSILON = 1e-12
# Dense around 0, where the optimum of the likelihood lies, and wide enough for ranking.
GRID: Array = np.sinh(np.linspace(-1, 1, 257) * np.arcsinh(BRACKET))
HESSIANS = ("gauss-newton", "newton")
FLAT = 1e-6  # nats per example: a smaller difference of losses may be rounding of float32 logits


def _mean(numerator: Array, denominator: Array) -> float:
    return float((numerator / (denominator + EPSILON)).mean())


def _median(numerator: Array, denominator: Array) -> float:
    return float(np.median(numerator / (denominator + EPSILON)))


def _trimmed(numerator: Array, denominator: Array) -> float:
    ratios = np.sort(numerator / (denominator + EPSILON))
    cut = int(TRIM * len(ratios))
    return float(ratios[cut : len(ratios) - cut].mean())


def _ratio(numerator: Array, denominator: Array) -> float:
    return float(numerator.sum() / (denominator.sum() + EPSILON))


FROM_TOKENS: dict[str, Callable[[Array, Array], float]] = {
    "mean": _mean,
    "median": _median,
    "trimmed": _trimmed,
    "ratio": _ratio,
}
ESTIMATORS = ("exact", *FROM_TOKENS)


def exact(losses: Losses, counts: Array, curves: Array) -> float:
    """Minimise counts @ losses(strength) globally: the best point of GRID, then ever finer grids.

    curves: the losses at every point of GRID, `[examples, len(GRID)]`. The strength is 0 unless
    another one is better.
    """
    if is_flat(counts, curves):
        return 0.0
    best = int(best_points(counts, curves))
    low, high = GRID[max(best - 1, 0)], GRID[min(best + 1, len(GRID) - 1)]
    while high - low > 1e-4 * max(1.0, abs(low)):
        points = np.linspace(low, high, 9)
        i = int(np.argmin([counts @ losses(point) for point in points]))
        low, high = points[max(i - 1, 0)], points[min(i + 1, 8)]
    strength = float((low + high) / 2)
    return strength if counts @ losses(strength) < counts @ losses(0.0) else 0.0


def best_points(counts: Array, curves: Array) -> NDArray[np.int64]:
    """The index in GRID of the best strength for each row of counts, `[draws, examples]`."""
    totals, zero = counts @ curves, len(GRID) // 2
    stays = is_flat(counts, curves) | (totals[..., zero] <= totals.min(-1))
    return np.where(stays, zero, totals.argmin(-1))


def is_flat(counts: Array, curves: Array) -> NDArray[np.bool_]:
    """Whether there is nothing to choose: the losses are the same at every strength."""
    return np.ptp(counts @ curves, axis=-1) <= FLAT * counts.sum(-1)
