"""Flat distributions: their supports are merged, at a cost that does not grow with them."""

import numpy as np
import pytest
import torch

from svd_engine.calibration import support_stats
from svd_engine.generation.scoring import Predictions
from svd_engine.kernels import reference

V = 4000


@pytest.fixture(scope="module")
def predicted():
    """Rows of thousands of likely tokens, one of a few, and targets on and off the supports."""
    torch.manual_seed(0)
    adapted, base = torch.randn(2, 12, V)
    adapted[3, :5] += 20
    target = adapted.argsort()[:, -1].clone()
    target[::2] = adapted.argmin(-1)[::2]
    return Predictions((adapted, base), target, torch.arange(12))


@pytest.mark.parametrize("direction", ["projected", "difference"])
@pytest.mark.parametrize("alpha", [0.001, 0.05])
def test_merged_supports_score_as_whole_rows(predicted, direction, alpha):
    stats = support_stats.gather([predicted], 0.001).at(alpha).along(direction)
    merged = stats.merged()
    assert stats.support_sizes().max() > 1000
    assert merged.support_sizes().max() <= support_stats.MERGED
    assert merged.support_sizes()[3] == stats.support_sizes()[3]
    rows = [x.double() for x in predicted.logits]
    # The vector of (10) is tiny where probabilities are.
    for strength in (-200.0, 8.0) if direction == "projected" else (-4.0, -1.0, 0.0, 2.0):
        truth = reference.score(
            *rows, strength, predicted.target, alpha=alpha, penalty=0.0, direction=direction
        )
        torch.testing.assert_close(merged.logprob(strength), truth, atol=3e-3, rtol=1e-4)
        divergence = stats.divergence(strength)
        torch.testing.assert_close(merged.divergence(strength), divergence, atol=3e-3, rtol=0)


def test_small_supports_stay_as_they_are(predicted):
    stats = support_stats.gather([predicted], 0.9)
    assert stats.merged() is stats


def test_equal_deltas_merge():
    rows = torch.zeros(1, V), torch.zeros(1, V)
    stats = support_stats.gather([Predictions(rows, torch.tensor([7]), torch.tensor([0]))], 0.1)
    merged = stats.merged()
    assert len(merged.p) == 2 and merged.on_target.sum() == 1
    np.testing.assert_allclose(merged.logprob(5.0), -np.log(V), rtol=1e-6)


def test_what_would_not_fit_in_memory_is_refused(predicted, monkeypatch):
    monkeypatch.setattr(support_stats, "MOST", 20_000)
    with pytest.raises(ValueError, match=r"at alpha = 0\.001 hold \d{4} tokens on average"):
        support_stats.gather([predicted], 0.001)
    assert len(support_stats.gather([predicted], 0.9).p) < 100
