"""The strength that suits a calibration set, and whether steering is worth turning on.

One pass over the data serves every mu and every alpha (see `supports`); `objectives` says what is
made small, `estimators` how one strength comes of it.
"""

from collections.abc import Sequence

import numpy as np

from svd_engine.calibration import support_stats
from svd_engine.calibration.cross_validation import AlphaFit, held_out
from svd_engine.calibration.estimators import BRACKET, ESTIMATORS, GRID, HESSIANS
from svd_engine.calibration.objectives import OBJECTIVES, Answers
from svd_engine.calibration.report import CalibrationReport, verdict
from svd_engine.data.examples import Example
from svd_engine.model.pair import ModelPair
from svd_engine.utils import bootstrap

__all__ = ["Answers", "CalibrationReport", "calibrate"]


def calibrate(
    pair: ModelPair,
    examples: Sequence[Example],
    *,
    objective: str | None = None,
    estimator: str = "exact",
    hessian: str = "gauss-newton",
    alpha: float | Sequence[float] = 0.1,
    length_normalised: bool = False,
    projection: bool = True,
    folds: int = 5,
    seed: int = 0,
    progress: bool = False,
) -> CalibrationReport:
    """Fit the strength to examples; by default on preference where there are rejected answers.

    estimator: "exact", the optimum of the objective, or "mean", "median", "trimmed" or "ratio" of
    the right answers' tokens (44)-(46) with the denominator of `hessian`: "gauss-newton" (20) or
    "newton" (19). alpha: one, or several to choose from. length_normalised: answers are compared
    by their log-probability a token. projection: False steers by the gradient (7) less its mean in
    place of its projection (10). The held-out figures come from `folds`-fold cross-validation
    over examples, the choice of alpha included. Raises ValueError.
    """
    if objective is None:
        objective = "preference" if any(e.rejected for e in examples) else "nll"
    for name, value, known in (
        ("objective", objective, OBJECTIVES),
        ("estimator", estimator, ESTIMATORS),
        ("hessian", hessian, HESSIANS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}.")
    alphas = [float(a) for a in ([alpha] if isinstance(alpha, int | float) else alpha)]
    if not alphas or not max(alphas) <= 1:
        raise ValueError(f"alpha must lie in (0, 1], one number or several; got {alpha}.")
    if objective != "nll":
        for i, example in enumerate(examples):
            if not example.rejected:
                raise ValueError(f"examples[{i}] has no rejected answers to prefer against.")
    elif length_normalised:
        raise ValueError("length_normalised compares answers; objective='nll' does not.")
    if not 2 <= folds <= len(examples):
        raise ValueError(
            f"folds must lie in [2, number of examples = {len(examples)}]; got {folds}."
        )
    answers = Answers(examples)
    entries = support_stats.collect(
        pair, answers.passages, min(alphas), "calibrating" if progress else None
    )
    return fit(
        answers, entries, alphas, objective, estimator, hessian, length_normalised, projection,
        folds, seed,
    )  # fmt: skip


def fit(
    answers: Answers,
    entries: support_stats.SupportStats,
    alphas: Sequence[float],
    objective: str,
    estimator: str = "exact",
    hessian: str = "gauss-newton",
    length_normalised: bool = False,
    projection: bool = True,
    folds: int = 5,
    seed: int = 0,
) -> CalibrationReport:
    """What `calibrate` makes of its one pass; entries: those of the smallest of alphas or below."""
    examples = len(answers.right)
    candidates = []
    for a in alphas:
        kept = entries.at(a) if projection else entries.at(a).unprojected()
        candidates.append(
            AlphaFit(a, answers, kept, objective, length_normalised, estimator, hessian)
        )
    everything = np.ones(examples, bool)
    fold = np.random.default_rng(seed).permutation(examples) % folds
    weights = answers.tokens() if objective == "nll" else np.ones(examples)
    alpha_losses = held_out(candidates, fold, everything)
    chosen = candidates[int(np.argmin(alpha_losses))]
    strength = chosen.estimate(everything)

    before, after = chosen.losses(0.0), np.empty(examples)
    nll_before, nll_after = chosen.nll(0.0), np.empty(examples)
    cost = 0.0
    for k in range(folds):
        inside, outside = fold != k, fold == k
        fitted = candidates[int(np.argmin(held_out(candidates, fold, inside)))]
        mu = fitted.estimate(inside)
        after[outside], nll_after[outside] = fitted.losses(mu)[outside], fitted.nll(mu)[outside]
        cost += fitted.cost_if_right(mu) / folds
    gains, gain_weights = before - after, weights
    if objective == "nll":
        # Examples that all want one thing ask for more without end; one that does not bounds it.
        gains, gain_weights = np.append(gains, -cost), np.append(weights, weights.mean())
    gain = bootstrap.of_ratio(gains, gain_weights, seed)
    tokens = answers.tokens().sum()
    return CalibrationReport(
        objective=objective,
        length_normalised=length_normalised,
        projection=projection,
        estimator=estimator,
        hessian=hessian,
        alpha=chosen.alpha,
        alpha_losses=list(zip(alphas, (alpha_losses / weights.sum()).tolist(), strict=True)),
        strength=strength,
        interval=chosen.interval(bootstrap.resamples(examples, seed)),
        optimum=chosen.optimum(everything),
        likelihood_strength=chosen.likeliest(),
        estimates=chosen.estimates(),
        loss_before=float(before.sum() / weights.sum()),
        loss_after=float(after.sum() / weights.sum()),
        gain_interval=gain,
        nll_before=float(nll_before.sum() / tokens),
        nll_after=float(nll_after.sum() / tokens),
        support_share=float(chosen.in_support.mean()),
        single_share=float((chosen.entries.support_sizes() == 1).double().mean()),
        examples=examples,
        tokens=len(entries.adapted),
        at_bracket=abs(strength) > 0.99 * BRACKET,
        verdict=verdict(gain),
        worthwhile=gain[0] > 0,
        curve=list(
            zip(GRID.tolist(), (chosen.curves.sum(0) / weights.sum()).tolist(), strict=True)
        ),
    )
