"""Bootstrap intervals."""

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000


def resamples(n: int, seed: int = 0) -> NDArray[np.float64]:
    """Draw DRAWS resamples of n items: how often each item is drawn, `[DRAWS, n]`."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(float)


def of_ratio(
    values: NDArray[np.float64], weights: NDArray[np.float64] | None = None, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % interval of sum(values) / sum(weights) over items; of the mean by default."""
    counts = resamples(len(values), seed)
    ratios = counts @ values / (counts @ (np.ones(len(values)) if weights is None else weights))
    return percentiles(ratios)


def of_means(values: NDArray[np.float64], seed: int = 0) -> NDArray[np.float64]:
    """Return 95 % intervals, `[columns, 2]`, of the means over n items of `[n, columns]` values."""
    means = resamples(len(values), seed) @ values / len(values)
    return np.percentile(means, [2.5, 97.5], axis=0).T


def percentiles(draws: NDArray[np.float64]) -> tuple[float, float]:
    """Return the central 95 % of the draws."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
