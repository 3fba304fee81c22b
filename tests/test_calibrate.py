"""The strength against dense searches in float64, and the verdict against planted data."""

import json
import random

import numpy as np
import pytest
import torch
from conftest import VOCAB, tiny_peft

from svd_engine import SteeredEngine, SteeringConfig, calibrate, intervals, supports
from svd_engine.examples import encode
from svd_engine.kernels import reference


def answers(n, seed=0, wrong=2):
    rng = random.Random(seed)

    def text(length):
        return [rng.randrange(3, VOCAB) for _ in range(length)]

    return [
        dict(prompt=text(4), completion=text(3), rejected=[text(rng.choice([2, 3]))] * wrong)
        for _ in range(n)
    ]


@pytest.fixture(scope="module")
def engine():
    return SteeredEngine(tiny_peft())


@torch.no_grad()
def dense_scores(engine, passages, mu, alpha=0.1):
    """log P_mu of each passage from whole rows in float64."""
    totals = []
    for prompt, completion in passages:
        ids = torch.tensor([prompt + completion])
        adapted = engine.model(ids).logits[0, len(prompt) - 1 : -1].double()
        with engine.model.disable_adapter():
            base = engine.model(ids).logits[0, len(prompt) - 1 : -1].double()
        target = torch.tensor(completion)
        scores = reference.score(adapted, base, target, mu, alpha=alpha, penalty=0.0)
        totals.append(float(scores.sum()))
    return np.array(totals)


@pytest.mark.parametrize("alpha", [0.02, 0.1, 1.0])
def test_supports_give_the_score_at_any_strength(engine, alpha):
    passages = calibrate.Answers(encode(answers(6), None)).passages
    entries = supports.collect(engine.pair, passages, alpha)
    for mu in (-20.0, 0.0, 3.0):
        got = entries.totals(entries.logprob(mu), len(passages)).numpy()
        np.testing.assert_allclose(got, dense_scores(engine, passages, mu, alpha), atol=1e-4)


def test_projections_are_those_of_the_operator(engine):
    passages = calibrate.Answers(encode(answers(4), None)).passages
    entries = supports.collect(engine.pair, passages, 0.1)
    numerator, gauss_newton = entries.projections()
    step = 1e-4
    slope = (entries.logprob(step) - entries.logprob(-step)) / (2 * step)
    torch.testing.assert_close(numerator, slope, atol=1e-6, rtol=1e-5)
    assert (gauss_newton >= 0).all() and (entries.support_sizes() >= 1).all()


def test_exact_is_the_dense_optimum_of_the_likelihood(engine):
    rows = answers(12)
    report = engine.calibrate(rows, objective="nll", force=True)
    passages = [(e.prompt, e.completion) for e in encode(rows, None)]

    def nll(mu):
        return -dense_scores(engine, passages, mu).sum()

    low, high = -64.0, 64.0
    for _ in range(60):  # ternary search: the objective is convex
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if nll(a) < nll(b) else (a, high)
        if high - low < 1e-4:
            break
    assert report.strength == pytest.approx((low + high) / 2, rel=1e-3, abs=1e-3)
    assert engine.steering.strength == report.strength


def test_preference_is_the_global_optimum_of_the_bracket(engine):
    rows = answers(10)
    report = engine.calibrate(rows, objective="preference", force=True)
    held = calibrate.Answers(encode(rows, None))
    entries = supports.collect(engine.pair, held.passages, 0.1)
    losses = held.losses(entries, "preference")
    everywhere = [losses(mu).sum() for mu in np.linspace(-64, 64, 4001)]
    assert losses(report.strength).sum() <= min(everywhere) + 1e-6
    curve = dict(report.curve)
    assert min(curve.values()) >= losses(report.strength).mean() - 1e-9


def test_the_preference_loss_is_the_logistic_loss_of_pairs(engine):
    rows = answers(5)
    held = calibrate.Answers(encode(rows, None))
    entries = supports.collect(engine.pair, held.passages, 0.1)
    scores = held.scores(entries, -3.0)
    loss = held.losses(entries, "preference")(-3.0)
    for e, (right, wrong) in enumerate(zip(held.right, held.wrong, strict=True)):
        pairs = [np.log1p(np.exp(scores[w] - scores[r])) for r in right for w in wrong]
        assert loss[e] == pytest.approx(np.mean(pairs))


class Planted:
    """Stands for the pair: every position has the logits that it is given."""

    device = torch.device("cpu")

    def __init__(self, adapted, base):
        self.rows = adapted, base

    def prefill(self, tokens, lengths, extra=0):
        return tuple(tokens[:, :, None].float() for _ in range(2))

    def logits(self, hidden):
        return tuple(row.expand(len(hidden[0]), -1) for row in self.rows)


def planted(right):
    """Two likely tokens, of which training moved the odds from 1 to 0."""
    adapted = torch.tensor([[1.0, 0.8, -9.0, -9.0]])
    base = torch.tensor([[0.0, 1.6, -9.0, -9.0]])
    examples = encode([dict(prompt=[3], completion=[t]) for t in right], None)
    return calibrate.calibrate(Planted(adapted, base), examples, objective="nll")


def test_verdicts():
    further = planted([0] * 38 + [1] * 2)  # the data are further from the base than the model
    assert further.worthwhile and further.strength < 0 and further.gain_interval[0] > 0
    assert further.interval[0] <= further.strength <= further.interval[1]
    back = planted([1] * 38 + [0] * 2)
    assert back.worthwhile and back.strength > 0
    there = planted([0] * 22 + [1] * 18)  # p(0) = 0.55: nothing to gain
    assert not there.worthwhile and "indifferent" in there.verdict
    assert there.nll_after <= there.nll_before + 0.02
    assert planted([0] * 40).at_bracket


def test_strength_is_0_where_nothing_is_gained(engine):
    rows = answers(12, seed=5)
    report = engine.calibrate(rows, objective="preference")
    assert engine.steering.strength == (report.strength if report.worthwhile else 0.0)
    assert engine.steering.verdict == report.verdict
    assert engine.steering.vocab_size == VOCAB


def test_same_seed_same_report(engine):
    rows = answers(8)
    assert engine.calibrate(rows, seed=3) == engine.calibrate(rows, seed=3)


def test_report_is_saved_as_json(engine, tmp_path):
    report = engine.calibrate(answers(8))
    saved = json.loads(report.save(tmp_path).read_text())
    assert saved["strength"] == report.strength and len(saved["curve"]) == len(calibrate.GRID)
    assert report.objective == "preference"


BAD = {
    "examples is empty": ([], {}),
    "objective must be": (answers(6), dict(objective="both")),
    "no rejected answers": (answers(6, wrong=0), dict(objective="preference")),
    r"folds must lie in \[2, number of examples = 6\]": (answers(6), dict(folds=7)),
    "alpha must lie in": (answers(6), dict(alpha=0.0)),
    r"examples\[0\]: an answer is empty": ([dict(prompt=[4], completion=[])], {}),
    "does not fit": ([dict(prompt=[4] * 128, completion=[5])] * 6, {}),
}


@pytest.mark.parametrize("message", BAD)
def test_refusals(engine, message):
    engine.steering = SteeringConfig(1.5)
    rows, options = BAD[message]
    with pytest.raises(ValueError, match=message):
        engine.calibrate(rows, **options)
    assert engine.steering == SteeringConfig(1.5)


def test_intervals_cover():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        low, high = intervals.of_ratio(rng.normal(1.0, 1.0, 50), seed=seed)
        hits += low <= 1.0 <= high
    assert 180 <= hits <= 199
