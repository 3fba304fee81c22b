"""direction="auto": what it chooses, judged on examples that had no part in the choice."""

import numpy as np
import pytest

from svd_engine import SteeredEngine
from svd_engine.calibration import support_stats
from svd_engine.calibration.estimators import GRID
from svd_engine.calibration.objectives import Answers
from svd_engine.calibration.options import AUTO_OBJECTIVES
from svd_engine.data.examples import encode
from tests.calibration.cases import answers
from tests.calibration.test_calibrate import least
from tests.tiny import tiny_peft

FOLDS, SEED, COUNT, ALPHAS = 3, 7, 6, (0.5, 0.1)


@pytest.fixture(scope="module")
def engine():
    return SteeredEngine(tiny_peft())


def by_loop(engine, examples, use):
    """The nested cross-validation in plain loops: (chosen candidate, held-out loss of each)."""
    held = Answers(encode(examples, None))
    stats = support_stats.collect(engine.pair, held.passages, min(ALPHAS))
    fold = np.random.default_rng(SEED).permutation(COUNT) % FOLDS
    found = {}
    for objective in AUTO_OBJECTIVES[use]:
        for direction in ("projected", "difference"):
            for alpha in ALPHAS:
                kept = stats.at(alpha).along(direction)
                losses = [
                    held.losses(kept, *which) for which in (objective, ("ranking",), ("nll",))
                ]
                curves = [np.stack([loss(mu) for mu in GRID], 1) for loss in losses]
                found[(*objective, direction, alpha)] = losses, curves

    def choose(among, parts):
        scores = {}
        for candidate, (_, (fitted, judged, nll)) in found.items():
            loss = change = 0.0
            for part in parts:
                point = fitted[among & ~part].sum(0).argmin()
                loss += judged[part, point].sum()
                change += (nll[part, point] - nll[part, 128]).sum()
            falls = use == "generation" and change > 0.02 * held.tokens()[among].sum()
            scores[candidate] = (change if falls else 0.0, loss)
        return min(scores, key=lambda candidate: scores[candidate])

    after = np.zeros(COUNT)
    for outer in range(FOLDS):
        others = fold != outer
        inner = [others & (fold == k) for k in range(FOLDS) if k != outer]
        fitted, judged, _ = found[choose(others, inner)][0]
        after[~others] = judged(least(fitted, others.astype(float)))[~others]
    return choose(fold >= 0, [fold == k for k in range(FOLDS)]), after


@pytest.mark.parametrize("use", ["generation", "ranking"])
def test_it_is_a_nested_cross_validation(engine, use):
    examples = answers(COUNT, seed=4)
    report = engine.calibrate(
        examples, use=use, direction="auto", alpha=ALPHAS, folds=FOLDS, seed=SEED
    )
    chosen, after = by_loop(engine, examples, use)
    assert chosen == (report.objective, report.length_normalised, report.direction, report.alpha)
    assert report.loss_after == pytest.approx(after.mean(), rel=1e-3, abs=1e-5)
    assert report.measure == "ranking" and report.loss_name == "ranking loss"
    assert len(report.candidates) == 12
    gains = {tuple(each.values())[:4]: each["gain"] for each in report.candidates}
    assert set(gains) == {
        (*objective, direction, alpha)
        for objective in AUTO_OBJECTIVES[use]
        for direction in ("projected", "difference")
        for alpha in ALPHAS
    }
    if use == "ranking":
        assert gains[chosen] == max(gains.values())
    alone = engine.calibrate(
        examples, use=use, objective=chosen[0], length_normalised=chosen[1], direction=chosen[2],
        alpha=chosen[3], force=True,
    )  # fmt: skip
    assert alone.strength == report.strength
    config = getattr(engine.steering, use)
    assert (config.direction, config.alpha, config.objective) == (chosen[2], chosen[3], chosen[0])


def test_an_objective_or_alphas_that_are_given_stay(engine):
    examples = answers(8)
    report = engine.calibrate(examples, objective="nll", direction="auto", alpha=(0.1, 0.5))
    assert report.measure == report.objective == "nll" and len(report.candidates) == 4
    assert {each["alpha"] for each in report.candidates} == {0.1, 0.5}
    without = [{k: v for k, v in e.items() if k != "rejected"} for e in examples]
    assert engine.calibrate(without, direction="auto").objective == "nll"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(estimator="mean"), "leave out estimator"),
        (dict(length_normalised=True), "leave out length_normalised"),
        (dict(objective="auto", direction="projected"), "objective must be one of preference"),
    ],
)
def test_refusals(engine, options, message):
    with pytest.raises(ValueError, match=message):
        engine.calibrate(answers(6), **{"direction": "auto", **options})
