"""Fit the strength to a calibration set and measure whether steering is worth turning on.

One pass over the data serves every strength and every alpha (see `support_stats`); `objectives`
defines the losses, `estimators` how one strength comes from them, `verdict` what they are worth.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from svd_engine.calibration import support_stats, verdict
from svd_engine.calibration.cross_validation import Fit, best_fit, fits, held_out
from svd_engine.calibration.estimators import BRACKET, GRID
from svd_engine.calibration.objectives import Answers, Array
from svd_engine.calibration.options import CalibrationOptions
from svd_engine.calibration.report import CalibrationReport
from svd_engine.calibration.support_stats import SupportStats
from svd_engine.calibration.verdict import Evidence
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
    return fit(answers, stats, options, progress)


def fit(
    answers: Answers, stats: SupportStats, options: CalibrationOptions, progress: bool = False
) -> CalibrationReport:
    """Fit the strength from one pass; stats: collected at the smallest alpha or below."""
    examples, tokens = len(answers.right), answers.tokens()
    everything = np.ones(examples, bool)
    fold = np.random.default_rng(options.seed).permutation(examples) % options.folds
    steps = len(options.directions) * len(options.alphas) * len(GRID) + options.folds + 2
    with tqdm(total=steps, desc="fitting", disable=not progress, leave=False) as bar:
        fitted = fits(answers, stats, options, bar.update)
        after, nll_after, cost = _held_out(fitted, fold, options.folds, bar.update)
        losses, nll_changes = held_out(fitted, fold, everything).T
        chosen = best_fit(fitted, fold, everything)
        strength = chosen.estimate(everything)
        bar.update()
        likeliest = chosen.likeliest()
        bar.update()

    weights = tokens if options.measure[0] == "nll" else np.ones(examples)
    before, nll_before = chosen.measured(0.0), chosen.nll(0.0)
    gains, gain_weights = before - after, weights
    if options.measure[0] == "nll":
        # Examples that agree ask for ever larger strengths; one where the model is right bounds it.
        gains, gain_weights = np.append(gains, -cost), np.append(weights, weights.mean())
    base, nll_base = _of_base(answers, stats, options)
    unguarded = options.use == "ranking"
    against = (before, after, base) if unguarded else (nll_before, nll_after, nll_base)
    against_weights = weights if unguarded else tokens
    evidence = Evidence(
        use=options.use,
        examples=examples,
        interval=chosen.interval(bootstrap.resamples(examples, options.seed)),
        gain=bootstrap.of_ratio(gains, gain_weights, options.seed),
        nll_change=float((nll_after - nll_before).sum() / tokens.sum()),
        behind_base=bootstrap.of_ratio(against[1] - against[2], against_weights, options.seed),
        adapted_behind_base=bootstrap.of_ratio(
            against[0] - against[2], against_weights, options.seed
        ),
        at_bracket=abs(strength) > 0.99 * BRACKET,
    )
    candidate, failures = chosen.candidate, verdict.failures(evidence)
    counted = float(tokens.sum()) if candidate.objective == "nll" else examples

    def mean(values: Array) -> float:
        return float(values.sum() / weights.sum())

    return CalibrationReport(
        use=options.use,
        objective=candidate.objective,
        length_normalised=candidate.length_normalised,
        direction=candidate.direction,
        estimator=options.estimator,
        hessian=options.hessian,
        alpha=candidate.alpha,
        alpha_losses=[
            (other.candidate.alpha, float(loss / weights.sum()))
            for other, loss in zip(fitted, losses, strict=True)
            if other.candidate[:3] == candidate[:3]
        ],
        measure=options.measure[0],
        candidates=[
            other.candidate._asdict()
            | {"gain": mean(before - loss / examples), "nll_change": float(change / tokens.sum())}
            for other, loss, change in zip(fitted, losses, nll_changes, strict=True)
        ],
        strength=strength,
        interval=evidence.interval,
        optimum=strength if options.estimator == "exact" else chosen.optimum(everything),
        likelihood_strength=likeliest,
        estimates=chosen.estimates(),
        loss_base=mean(base),
        loss_before=mean(before),
        loss_after=mean(after),
        gain_interval=evidence.gain,
        nll_base=float(nll_base.sum() / tokens.sum()),
        nll_before=float(nll_before.sum() / tokens.sum()),
        nll_after=float(nll_after.sum() / tokens.sum()),
        support_share=float(chosen.steered.in_support.mean()),
        single_share=chosen.steered.single_share,
        examples=examples,
        tokens=len(stats.adapted),
        at_bracket=evidence.at_bracket,
        verdict=verdict.verdict(evidence),
        failures=failures,
        warnings=verdict.warnings(evidence),
        worthwhile=not failures,
        curve=[
            (mu, loss / counted)
            for mu, loss in zip(GRID.tolist(), chosen.curves.sum(0).tolist(), strict=True)
        ],
    )


def _held_out(
    fitted: list[Fit], fold: NDArray[np.int64], folds: int, tick: Callable[[], object]
) -> tuple[Array, Array, float]:
    """Loss and NLL of each example with candidate and strength chosen on the other folds.

    The third result is the mean over folds of what such a strength costs if the model is right.
    """
    after, nll_after = np.empty(len(fold)), np.empty(len(fold))
    cost = 0.0
    for k in range(folds):
        inside, outside = fold != k, fold == k
        chosen = best_fit(fitted, fold, inside)
        strength = chosen.estimate(inside)
        after[outside] = chosen.measured(strength)[outside]
        nll_after[outside] = chosen.nll(strength)[outside]
        cost += chosen.cost_if_right(strength) / folds
        tick()
    return after, nll_after, cost


def _of_base(
    answers: Answers, stats: SupportStats, options: CalibrationOptions
) -> tuple[Array, Array]:
    """Loss and NLL of each example under the base."""
    # A token that the base cannot predict has log q = -inf.
    scores = stats.totals(stats.base.clamp(-1e6), len(answers.passages)).numpy()
    loss, nll = (
        answers.losses_of(lambda _: scores, *measure)(0.0)
        for measure in (options.measure, ("nll", False))
    )
    return loss, nll
