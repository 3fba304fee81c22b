"""The few numbers per answer token against whole rows in float64."""

from dataclasses import astuple

import numpy as np
import pytest
import torch

from svd_engine.calibration import support_stats
from svd_engine.calibration.objectives import Answers
from svd_engine.data.examples import encode
from svd_engine.generation.scoring import Predictions
from svd_engine.kernels import reference
from tests.calibration.cases import answers, dense, rows_of
from tests.calibration.cases import engine as engine  # a fixture
from tests.tiny import VOCAB


@pytest.mark.parametrize("alpha", [0.02, 0.1, 1.0])
def test_supports_give_the_score_at_any_strength(engine, alpha):
    passages = Answers(encode(answers(6), None)).passages
    stats = support_stats.collect(engine.pair, passages, alpha)
    scores = dense(engine, passages)
    for mu in (-20.0, 0.0, 3.0):
        got = stats.totals(stats.logprob(mu), len(passages)).numpy()
        np.testing.assert_allclose(got, scores(mu, alpha), atol=1e-4)


@pytest.mark.parametrize("strength", [-64.0, -1.0, 64.0])
def test_strengths_whose_exponentials_overflow(strength):
    """One position is moved by hundreds of nats, the other hardly, with mass off its support."""
    adapted = torch.tensor([[0.2, 0.0, -3.0, -4.0], [0.3, 0.0, -0.9, -0.8]])
    base = adapted + torch.tensor([[40.0, -40.0, 0.0, 0.0], [0.02, 0.0, 0.01, -0.01]])
    target = torch.tensor([1, 2])
    predicted = Predictions((adapted, base), target, torch.arange(2))
    got = support_stats.gather([predicted], 0.5).logprob(strength)
    rows = adapted.double(), base.double()
    truth = reference.score(*rows, strength, target, alpha=0.5, penalty=0.0)
    torch.testing.assert_close(got, truth, atol=2e-4, rtol=1e-5)


def test_projections_are_those_of_the_operator(engine):
    passages = Answers(encode(answers(4), None)).passages
    stats = support_stats.collect(engine.pair, passages, 0.1)
    got = stats.projections()
    expected = [[], [], []]
    with torch.no_grad():
        for prompt, completion in passages:
            adapted, base = rows_of(engine, prompt, completion)
            terms = reference.project_strength(adapted, base, torch.tensor(completion))
            for column, term in zip(expected, terms[:3], strict=True):
                column.append(term)
    order = torch.argsort(stats.passage, stable=True)
    for mine, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(mine[order], torch.cat(truth), atol=1e-6, rtol=1e-4)
    step = 1e-4
    slope = (stats.logprob(step) - stats.logprob(-step)) / (2 * step)
    torch.testing.assert_close(got[0], slope, atol=1e-6, rtol=1e-5)
    assert (stats.support_sizes() >= 1).all()


def test_supports_at_a_larger_alpha_are_those_collected_there(engine):
    passages = Answers(encode(answers(6), None)).passages
    wide = support_stats.collect(engine.pair, passages, 0.01)
    assert len(wide.p) > len(wide.at(0.3).p) > len(wide.at(1.0).p) >= len(wide.adapted)
    for alpha in (0.01, 0.3, 1.0):
        for mine, truth in zip(
            astuple(wide.at(alpha)),
            astuple(support_stats.collect(engine.pair, passages, alpha)),
            strict=True,
        ):
            assert torch.equal(mine, truth)


@pytest.mark.parametrize("spoilt", ["nothing", "adapted -inf", "base -inf", "both -inf"])
def test_the_entries_are_what_steering_changes(spoilt):
    torch.manual_seed(0)
    adapted, base = 3 * torch.randn(2, 20, VOCAB)
    target = torch.arange(20) + 1
    if spoilt in ("adapted -inf", "both -inf"):
        adapted[::3, 40] = -torch.inf
    if spoilt in ("base -inf", "both -inf"):
        base[::3, 40] = -torch.inf
    parts = [
        Predictions((adapted[rows], base[rows]), target[rows], rows)
        for rows in torch.arange(20).split(8)
    ]
    got = support_stats.gather(parts, 0.05)
    z, b = adapted.double(), base.double()
    kept = reference.steer(z, b, 1.0, alpha=0.05).isfinite()
    row, token = kept.nonzero().T
    assert torch.equal(got.position, row)
    assert torch.equal(got.on_target, token == target[row])
    torch.testing.assert_close(got.p, z.softmax(-1)[kept], atol=0, rtol=1e-5)
    delta = reference.steering_vector(z, b)[kept]
    torch.testing.assert_close(got.delta, delta, atol=1e-6, rtol=1e-5)
    for mine, logits in ((got.adapted, z), (got.base, b)):
        every = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
        torch.testing.assert_close(mine, every, atol=1e-5, rtol=0)


def test_divergence_is_that_of_whole_rows(engine):
    passages = Answers(encode(answers(3), None)).passages
    stats = support_stats.collect(engine.pair, passages, 0.1)
    order = torch.argsort(stats.passage, stable=True)
    expected = []
    with torch.no_grad():
        for prompt, completion in passages:
            adapted, base = rows_of(engine, prompt, completion)
            steered = reference.steer(adapted, base, -3.0, alpha=0.1, penalty=0.0)
            expected.append(reference.divergence(adapted, steered))
    torch.testing.assert_close(
        stats.divergence(-3.0)[order], torch.cat(expected), atol=1e-5, rtol=1e-4
    )
