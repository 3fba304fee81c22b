"""Estimators and objectives against dense searches in float64."""

import numpy as np
import pytest
import torch

from svd_engine.calibration import estimators, support_stats
from svd_engine.calibration.objectives import Answers
from svd_engine.data.examples import encode
from svd_engine.kernels import reference
from tests.calibration.cases import answers, dense, rows_of
from tests.calibration.cases import engine as engine  # a fixture


def test_exact_is_the_dense_optimum_of_the_likelihood(engine):
    examples = answers(12)
    report = engine.calibrate(examples, objective="nll", force=True)
    scores = dense(engine, [(e.prompt, e.completion) for e in encode(examples, None)])

    def nll(mu):
        return -scores(mu).sum()

    low, high = -64.0, 64.0
    for _ in range(60):  # ternary search: the objective is convex
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if nll(a) < nll(b) else (a, high)
        if high - low < 1e-4:
            break
    assert report.strength == pytest.approx((low + high) / 2, rel=1e-3, abs=1e-3)
    assert engine.steering.generation.strength == report.strength


def test_preference_is_the_global_optimum_of_the_bracket(engine):
    examples = answers(10)
    report = engine.calibrate(examples, objective="preference", force=True)
    held = Answers(encode(examples, None))
    stats = support_stats.collect(engine.pair, held.passages, 0.1)
    losses = held.losses(stats, "preference")
    everywhere = [losses(mu).sum() for mu in np.linspace(-64, 64, 4001)]
    assert losses(report.strength).sum() <= min(everywhere) + 1e-6
    curve = dict(report.curve)
    assert min(curve.values()) >= losses(report.strength).mean() - 1e-9


def test_the_estimators_by_hand():
    numerator = np.array([1.0, -2.0, 3.0, 0.5, 40.0] * 4)
    denominator = np.array([1.0, 4.0, 1.5, 0.5, 1e-3] * 4)
    ratios = sorted(numerator / denominator)
    expected = {
        "mean": np.mean(ratios),
        "median": 1.0,
        "trimmed": np.mean(ratios[2:-2]),
        "ratio": numerator.sum() / denominator.sum(),
    }
    for name, of_tokens in estimators.FROM_TOKENS.items():
        assert of_tokens(numerator, denominator) == pytest.approx(expected[name], rel=1e-6)


@pytest.mark.parametrize("hessian", estimators.HESSIANS)
@pytest.mark.parametrize("estimator", estimators.FROM_TOKENS)
def test_every_estimator_is_that_of_the_right_answers_tokens(engine, estimator, hessian):
    examples = answers(8)
    report = engine.calibrate(examples, estimator=estimator, hessian=hessian, force=True)
    terms = [[], []]
    with torch.no_grad():
        for example in encode(examples, None):
            adapted, base = rows_of(engine, example.prompt, example.completion)
            term = reference.project_strength(adapted, base, torch.tensor(example.completion))
            terms[0].append(term.numerator.numpy())
            terms[1].append(getattr(term, hessian.replace("-", "_")).numpy())
    expected = estimators.FROM_TOKENS[estimator](*map(np.concatenate, terms))
    estimate = report.estimates[f"{estimator} {hessian}"]
    # A token whose vector is nothing but rounding rules the mean.
    assert estimate == pytest.approx(expected, rel=0.05 if estimator == "mean" else 1e-3)
    assert report.strength == np.clip(estimate, -64, 64)
    assert report.at_bracket == (abs(report.strength) > 63.9)
    low, high = report.interval
    assert -64 <= low <= high <= 64
    assert engine.steering.generation.strength == report.strength
    assert engine.steering.generation.estimator == estimator
    exact = engine.calibrate(examples)
    assert report.optimum == exact.strength and report.estimates == exact.estimates


def test_length_normalised_preference_compares_log_probabilities_a_token(engine):
    examples = answers(6)
    held = Answers(encode(examples, None))
    stats = support_stats.collect(engine.pair, held.passages, 0.1)
    scores = held.scores(stats, 2.0)
    loss = held.losses(stats, "preference", True)(2.0)
    for e, (right, wrong) in enumerate(zip(held.right, held.wrong, strict=True)):
        pairs = [
            np.log1p(np.exp(scores[w] / held.lengths[w] - scores[r] / held.lengths[r]))
            for r in right
            for w in wrong
        ]
        assert loss[e] == pytest.approx(np.mean(pairs))
    report = engine.calibrate(examples, length_normalised=True, force=True)
    assert report.length_normalised and report.strength != engine.calibrate(examples).strength


@pytest.mark.parametrize(
    "objective, of_margin",
    [("preference", lambda m: np.log1p(np.exp(m))), ("ranking", lambda m: 1 / (1 + np.exp(-m)))],
)
def test_a_loss_is_the_mean_over_pairs(engine, objective, of_margin):
    examples = answers(5)
    held = Answers(encode(examples, None))
    stats = support_stats.collect(engine.pair, held.passages, 0.1)
    scores = held.scores(stats, -3.0)
    loss = held.losses(stats, objective)(-3.0)
    for e, (right, wrong) in enumerate(zip(held.right, held.wrong, strict=True)):
        pairs = [of_margin(scores[w] - scores[r]) for r in right for w in wrong]
        assert loss[e] == pytest.approx(np.mean(pairs))


def test_ranking_lowers_the_share_of_pairs_in_the_wrong_order(engine):
    report = engine.calibrate(answers(10), objective="ranking", force=True)
    curve = dict(report.curve)
    assert report.loss_name == "ranking loss" and all(0 <= x <= 1 for x in curve.values())
    assert min(curve.values()) < curve[0.0]


def test_strength_0_is_kept_unless_another_is_better():
    def losses(strength):
        return np.array([max(strength, 0.0)])

    curves = np.maximum(estimators.GRID, 0.0)[None]  # every strength below 0 is as good
    assert estimators.exact(losses, np.ones(1), curves) == 0
    assert estimators.GRID[estimators.best_points(np.ones((1, 1)), curves)] == 0
