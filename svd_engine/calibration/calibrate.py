"""Fit the strength to a calibration set and measure whether steering is worth turning on.

One pass over the data serves every strength and every alpha (see `support_stats`); `objectives`
defines the losses, `estimators` how one strength comes from them.
"""

import numpy as np
from numpy.typing import NDArray

from svd_engine.calibration import support_stats
from svd_engine.calibration.cross_validation import AlphaFit, best_fit, held_out_losses
from svd_engine.calibration.estimators import BRACKET, GRID
from svd_engine.calibration.objectives import Answers, Array
from svd_engine.calibration.options import CalibrationOptions
from svd_engine.calibration.report import CalibrationReport, verdict
from svd_engine.calibration.support_stats import SupportStats
from svd_engine.model.pair import ModelPair
from svd_engine.utils import bootstrap


def calibrate(
    pair: ModelPair, answers: Answers, options: CalibrationOptions, progress: bool = False
) -> CalibrationReport:
    """Fit the strength to the answers, with held-out figures from cross-validation over examples.

    options: those of `CalibrationOptions.checked`. Raises ValueError.
    """
    stats = support_stats.collect(
        pair, answers.passages, min(options.alphas), "calibrating" if progress else None
    )
    return fit(answers, stats, options)


def fit(answers: Answers, stats: SupportStats, options: CalibrationOptions) -> CalibrationReport:
    """Fit the strength from one pass; stats: collected at the smallest alpha or below."""
    examples = len(answers.right)
    everything = np.ones(examples, bool)
    fits = [AlphaFit(alpha, answers, stats, options) for alpha in options.alphas]
    fold = np.random.default_rng(options.seed).permutation(examples) % options.folds
    weights = answers.tokens() if options.objective == "nll" else np.ones(examples)
    alpha_losses = held_out_losses(fits, fold, everything)
    chosen = fits[int(np.argmin(alpha_losses))]
    strength = chosen.estimate(everything)

    before, nll_before = chosen.losses(0.0), chosen.nll(0.0)
    after, nll_after, cost = _held_out(fits, fold, options.folds)
    gains, gain_weights = before - after, weights
    if options.objective == "nll":
        # Examples that agree ask for ever larger strengths; one where the model is right bounds it.
        gains, gain_weights = np.append(gains, -cost), np.append(weights, weights.mean())
    gain = bootstrap.of_ratio(gains, gain_weights, options.seed)
    tokens = answers.tokens().sum()
    return CalibrationReport(
        use=options.use,
        objective=options.objective,
        length_normalised=options.length_normalised,
        direction=options.direction,
        estimator=options.estimator,
        hessian=options.hessian,
        alpha=chosen.alpha,
        alpha_losses=[
            (fitted.alpha, float(loss / weights.sum()))
            for fitted, loss in zip(fits, alpha_losses, strict=True)
        ],
        strength=strength,
        interval=chosen.interval(bootstrap.resamples(examples, options.seed)),
        optimum=chosen.optimum(everything),
        likelihood_strength=chosen.likeliest(),
        estimates=chosen.estimates(),
        loss_before=float(before.sum() / weights.sum()),
        loss_after=float(after.sum() / weights.sum()),
        gain_interval=gain,
        nll_before=float(nll_before.sum() / tokens),
        nll_after=float(nll_after.sum() / tokens),
        support_share=float(chosen.in_support.mean()),
        single_share=float((chosen.stats.support_sizes() == 1).double().mean()),
        examples=examples,
        tokens=len(stats.adapted),
        at_bracket=abs(strength) > 0.99 * BRACKET,
        verdict=verdict(gain),
        worthwhile=gain[0] > 0,
        curve=list(
            zip(GRID.tolist(), (chosen.curves.sum(0) / weights.sum()).tolist(), strict=True)
        ),
    )


def _held_out(
    fits: list[AlphaFit], fold: NDArray[np.int64], folds: int
) -> tuple[Array, Array, float]:
    """Loss and NLL of each example with alpha and strength fitted on the other folds.

    The third result is the mean over folds of what such a strength costs if the model is right.
    """
    after, nll_after = np.empty(len(fold)), np.empty(len(fold))
    cost = 0.0
    for k in range(folds):
        inside, outside = fold != k, fold == k
        fitted = best_fit(fits, fold, inside)
        strength = fitted.estimate(inside)
        after[outside] = fitted.losses(strength)[outside]
        nll_after[outside] = fitted.nll(strength)[outside]
        cost += fitted.cost_if_right(strength) / folds
    return after, nll_after, cost
