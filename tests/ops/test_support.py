"""`support` beyond the contract: supports larger than the first try, and what stands on it."""

import math

import pytest
import torch

from svd_engine import ops
from svd_engine.kernels import reference

from .cases import logits


@pytest.mark.parametrize("direction", reference.DIRECTIONS)
@pytest.mark.parametrize("alpha", [0.0, 1e-3, 0.3])
def test_without_a_capacity_every_support_is_whole(alpha, direction):
    z, b = logits(6, 3001, "cpu", torch.bfloat16)
    z[2, 5:1500], b[3, 9] = -math.inf, -math.inf
    target, given = torch.arange(6), dict(alpha=alpha, direction=direction)
    got = ops.support(z, b, target, **given)
    want = reference.support(z.double(), b.double(), target, 3001, **given)
    assert torch.equal(got.size, want.size) and got.token.shape[1] == max(64, int(got.size.max()))
    assert torch.equal(got.token, want.token[:, : got.token.shape[1]])


def test_no_rows_and_few_tokens():
    none = torch.empty(0, 100)
    got = ops.support(none, none, torch.empty(0, dtype=torch.int64))
    assert got.token.shape == (0, 64) and got.size.shape == (0,)
    z, b = logits(2, 3, "cpu")
    assert ops.support(z, b, torch.tensor([0, 1]), alpha=0.0).token.tolist() == [[0, 1, 2]] * 2


def test_it_is_what_scores_and_strengths_are_made_of():
    z, b = logits(5, 700, "cpu")
    target = torch.tensor([0, 7, int(z[2].argmax()), int(z[3].argmax()), 9])
    for direction in reference.DIRECTIONS:
        given = dict(alpha=0.05, direction=direction)
        got = ops.support(z, b, target, **given)
        at_target = (got.delta * (got.token == target[:, None])).sum(-1)
        for mu in (-3.0, 0.0, 2.0):
            normaliser = (got.p * torch.expm1(mu * got.delta)).sum(-1).log1p()
            scored = ops.score(z, b, mu, target, penalty=0.0, **given)
            torch.testing.assert_close(got.logp + mu * at_target - normaliser, scored)
        terms = ops.project_strength(z, b, target, **given)
        torch.testing.assert_close(at_target - (got.p * got.delta).sum(-1), terms.numerator)
        torch.testing.assert_close(got.delta.square().sum(-1), terms.gauss_newton)
        torch.testing.assert_close(got.divergence, ops.divergence(z, b))


def test_compiled_code_gives_the_slots():
    z, b = logits(2, 100, "cpu")
    compiled = torch.compile(ops.support, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="capacity must be a number"):
        compiled(z, b, torch.arange(2))
