""" "Use it" has conditions; the verdict names those that fail."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from svd_engine.calibration import verdict
from svd_engine.calibration.verdict import Evidence
from svd_engine.data.examples import encode
from tests.calibration.cases import answers
from tests.calibration.cases import engine as engine  # a fixture
from tests.calibration.test_calibrate import PLANTED, Planted, calibrated

GOOD = Evidence(
    use="generation", examples=80, interval=(-4.0, -1.0), gain=(0.1, 0.3), nll_change=0.01,
    behind_base=(-0.5, -0.2), adapted_behind_base=(-0.3, -0.1), at_bracket=False,
)  # fmt: skip
FAILURES = {
    "indifferent: the interval of the held-out gain contains 0": dict(gain=(-0.1, 0.3)),
    "indifferent: the interval of the strength contains 0": dict(interval=(-37.6, 39.1)),
    "indifferent: 6 examples are too few, it takes 20": dict(examples=6),
    "do not use it: held-out examples lose": dict(gain=(-0.3, -0.1)),
    "do not use it: the likelihood falls by 0.05 nats a token, more than 0.02": dict(
        nll_change=0.05
    ),
    "do not use it: the base alone does better than the steered model": dict(
        behind_base=(0.1, 0.2)
    ),
}


def test_use_it():
    assert verdict.verdict(GOOD).startswith("use it: ") and not verdict.failures(GOOD)
    assert not verdict.warnings(GOOD)
    ranking = replace(GOOD, use="ranking", nll_change=100.0)
    assert verdict.verdict(ranking).startswith("use it: ")


@pytest.mark.parametrize("said", FAILURES)
def test_each_condition_is_named(said):
    evidence = replace(GOOD, **FAILURES[said])
    assert verdict.verdict(evidence) == said
    assert verdict.failures(evidence) == [said.partition(": ")[2]]


def test_all_that_fail_are_named():
    evidence = replace(GOOD, examples=6, gain=(-0.1, 0.3), interval=(-37.6, 39.1))
    assert verdict.verdict(evidence).count(";") == 2 == len(verdict.failures(evidence)) - 1


def test_warnings():
    evidence = replace(GOOD, adapted_behind_base=(0.1, 0.2), at_bracket=True)
    assert verdict.verdict(evidence).startswith("use it: ")
    worse, end = verdict.warnings(evidence)
    assert worse == "the adapter is worse than its base" and "end of the search" in end


def test_six_examples_turn_nothing_on():
    report = calibrated(PLANTED, [0] * 6, folds=3, objective="nll")
    assert "6 examples are too few" in report.verdict and not report.worthwhile
    assert report.to_steering_config().strength == 0
    assert report.to_steering_config(force=True).strength == report.strength != 0


# The base says token 0, which the adapted model never says, and prefers 1 to 2.
BROKEN = Planted(torch.tensor([[-4.0, 2.0, 3.0, -9.0]]), torch.tensor([[4.0, 1.0, 0.0, -9.0]]))


@pytest.mark.parametrize("rejected", [[], [[2]]])
def test_a_broken_adapter_is_named(rejected):
    """Toward the base its texts gain much, and are still worse than the base's."""
    examples = [dict(prompt=[3], completion=[i % 2], rejected=rejected) for i in range(40)]
    report = calibrated(BROKEN, examples=examples)
    assert report.loss_after < report.loss_before and report.strength > 0
    assert "the adapter is worse than its base" in report.warnings
    assert "the base alone does better" in report.verdict and not report.worthwhile


def test_the_base_has_its_row(engine):
    examples = answers(8)
    report = engine.calibrate(examples, objective="nll")
    held = encode(examples, None)
    nll = -sum(engine.score(e.prompt, [e.completion], model="base")[0] for e in held)
    tokens = sum(len(e.completion) for e in held)
    assert report.nll_base == pytest.approx(nll / tokens, rel=1e-4)
    assert report.loss_base == report.nll_base
    ranking = engine.calibrate(examples, use="ranking")
    margins = [
        np.subtract(*engine.score(e.prompt, [e.rejected[0], e.completion], model="base"))
        for e in held
    ]
    expected = np.mean(1 / (1 + np.exp(-np.array(margins))))
    assert ranking.loss_base == pytest.approx(expected, rel=1e-4)
    assert ranking.nll_base == report.nll_base
