"""The reference against the paper's own formulas in float64, and the rules for odd rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svd_engine.kernels import reference as ref

INF, NAN = math.inf, math.nan


def rows(n=5, v=60, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(2, n, v, generator=generator, dtype=torch.float64)).unbind()


def paper_delta(z, b):
    """(10) with the Jacobian of the softmax written out."""
    p, q = z.softmax(-1), b.softmax(-1)
    g = -(p.log() - q.log() + 1)
    jacobian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return (jacobian @ g[:, :, None])[:, :, 0]


def test_steering_vector_equals_the_jacobian_form():
    z, b = rows()
    torch.testing.assert_close(ref.steering_vector(z, b), paper_delta(z, b), atol=1e-14, rtol=0)


@pytest.mark.parametrize("strength", [-3.0, 0.0, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("penalty", [-INF, -7.0, 0.0])
def test_steer_equals_the_paper(strength, alpha, penalty):
    z, b = rows()
    p = z.softmax(-1)
    keep = p >= alpha * p.amax(-1, keepdim=True) * (1 - 1e-9)
    off = torch.full_like(z, -INF) if penalty == -INF else z + abs(strength) * penalty
    truth = torch.where(keep, z + strength * paper_delta(z, b), off)
    got = ref.steer(z, b, strength, alpha=alpha, penalty=penalty)
    torch.testing.assert_close(got, truth, atol=1e-12, rtol=0)


def test_steer_takes_a_strength_a_row():
    z, b = rows(n=3)
    strengths = torch.tensor([-1.0, 0.0, 4.0])
    got = ref.steer(z, b, strengths)
    for i, strength in enumerate(strengths.tolist()):
        torch.testing.assert_close(got[i : i + 1], ref.steer(z[i : i + 1], b[i : i + 1], strength))


def test_projection_gives_the_derivatives_of_the_likelihood():
    z, b = rows(n=6, v=20)
    target = torch.arange(6)
    for alpha in (0.0, 0.2):
        got = ref.project_strength(z, b, target, alpha=alpha)
        support = z >= z.amax(-1, keepdim=True) + ref.log_alpha(alpha)
        delta = torch.where(support, paper_delta(z, b), 0.0)
        mu = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        logp = (z + mu[:, None] * delta).log_softmax(-1).gather(-1, target[:, None]).sum()
        (slope,) = torch.autograd.grad(logp, mu, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), mu)
        torch.testing.assert_close(got.numerator, slope.detach())
        torch.testing.assert_close(got.newton, -curvature)
        torch.testing.assert_close(got.gauss_newton, delta.square().sum(-1))
        assert torch.equal(got.in_support, support.gather(-1, target[:, None])[:, 0])


def test_divergence_equals_torch():
    z, b = rows()
    truth = torch.nn.functional.kl_div(
        b.log_softmax(-1), z.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(ref.divergence(z, b), truth)


def test_impossible_tokens():
    z, b = rows(n=4)
    z[0, 3] = b[0, 3] = -INF  # in both
    b[1, 3] = -INF  # in the base alone: no opinion
    z[2, 3] = -INF  # in the adapted alone
    z[3, :40] = -INF  # a whole stretch
    delta = ref.steering_vector(z, b)
    assert delta.isfinite().all()
    assert (delta[[0, 1, 2], [3, 3, 3]] == 0).all()
    torch.testing.assert_close(delta.sum(-1), torch.zeros(4, dtype=torch.float64))
    steered = ref.steer(z, b, -5.0, alpha=0.0)
    assert torch.equal(steered == -INF, z == -INF)
    without = [i for i in range(60) if i != 3]
    shared = ref.divergence(z[:1, without], b[:1, without])
    torch.testing.assert_close(ref.divergence(z[:1], b[:1]), shared)
    assert ref.divergence(z[1:2], b[1:2]) == INF


def test_underflow_is_not_nan():
    z = torch.tensor([[0.0, -200.0, -1e30]])
    b = torch.tensor([[0.0, -250.0, -1e30]])
    assert ref.steering_vector(z, b).isfinite().all()
    assert ref.divergence(z, b).isfinite().all()


@pytest.mark.parametrize("where", ["adapted", "base"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_bad_row_is_nan_alone(where, value):
    z, b = rows(n=3)
    clean = ref.steer(z, b, 2.0)
    (z if where == "adapted" else b)[1, 7] = value
    got = ref.steer(z, b, 2.0)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    assert ref.sample(z, b, 2.0).token[1] == -1
    assert ref.topk(z, b, 2.0, 3).token[1].tolist() == [-1] * 3
    assert ref.score(z, b, 2.0, torch.zeros(3, dtype=torch.int64))[1].isnan()
    listed = ref.support(z, b, torch.zeros(3, dtype=torch.int64), 60)
    assert listed.size[1] == 0 and (listed.token[1] == -1).all() and listed.logp[1].isnan()


def test_ties_go_to_the_lowest_id():
    z = torch.tensor([[1.0, 5.0, 5.0, 0.0]])
    assert ref.sample(z, z, 3.0).token == 1
    assert ref.topk(z, z, 3.0, 2).token.tolist() == [[1, 2]]


def test_support_lists_what_steer_keeps():
    z, b = rows()
    target = torch.arange(5)
    kept = ref.steer(z, b, 1.0, alpha=0.05).isfinite()
    for direction in ref.DIRECTIONS:
        got = ref.support(z, b, target, 60, alpha=0.05, direction=direction)
        row, slot = (got.token >= 0).nonzero().T
        token = got.token[row, slot]
        assert torch.equal(torch.stack([row, token], 1), kept.nonzero())
        assert torch.equal(got.size, kept.sum(-1))
        torch.testing.assert_close(got.p[row, slot], z.softmax(-1)[kept])
        delta = ref.steering_vector(z, b, direction)[kept]
        torch.testing.assert_close(got.delta[row, slot], delta)
        torch.testing.assert_close(got.logp, z.log_softmax(-1).diagonal())
        torch.testing.assert_close(got.logq, b.log_softmax(-1).diagonal())
        torch.testing.assert_close(got.mean_d, (z.softmax(-1) * (z - b)).sum(-1))
        torch.testing.assert_close(got.divergence, ref.divergence(z, b))
    few = ref.support(z, b, target, 2, alpha=0.05)
    assert torch.equal(few.token, got.token[:, :2]) and torch.equal(few.size, got.size)


def test_philox_known_answers():
    # Random123's kat_vectors for philox4x32-10 at counter 0, key 0.
    zero = torch.zeros(4, dtype=torch.int64)
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert ref.philox(zero, torch.arange(4), zero).tolist() == words
    assert ref.NOISE_VERSION == 2  # raise it where this changes
    # Every word of seed and position matters.
    draws = {
        int(ref.philox(torch.tensor(s), torch.tensor(t), torch.tensor(p)))
        for s in (0, 1, 1 << 40)
        for t in (0, 1)
        for p in (0, 1, 1 << 40)
    }
    assert len(draws) == 18


def test_gumbel_noise_has_its_tails():
    noise = ref.gumbel_noise(3, 1, 1, 1_000_000)[0]
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772) < 0.01 and abs(noise.var() - math.pi**2 / 6) < 0.02
    for gap in (10.0, 12.0):  # P(noise > gap) is close to exp(-gap)
        expected = 1e6 * math.exp(-gap)
        assert abs(int((noise > gap).sum()) - expected) < 5 * math.sqrt(expected)


def test_sampling_follows_the_distribution():
    z, b = rows(n=1, v=6, spread=1.0)
    steered = ref.steer(z, b, 2.0, alpha=0.0)
    n = 20_000
    positions = torch.arange(n)
    token = ref.sample(
        z.expand(n, 6), b.expand(n, 6), 2.0, alpha=0.0, temperature=0.7, position=positions
    ).token
    expected = n * (steered[0] / 0.7).softmax(-1)
    chi2 = ((torch.bincount(token, minlength=6) - expected) ** 2 / expected).sum()
    assert chi2 < 20.5  # 99.9 % of chi-square with 5 degrees of freedom


def test_cuts_follow_transformers():
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    z, b = rows(n=8, v=40)
    steered = ref.steer(z, b, 1.0, alpha=0.0)
    for kwargs, warper in (
        (dict(top_k=5), TopKLogitsWarper(5)),
        (dict(top_p=0.7), TopPLogitsWarper(0.7)),
        (dict(min_p=0.2), MinPLogitsWarper(0.2)),
    ):
        arguments = dict(top_k=0, top_p=1.0, min_p=0.0) | kwargs
        ours = ref.cut((steered / 0.8).log_softmax(-1), **arguments).isfinite()
        theirs = warper(torch.zeros(8, 1, dtype=torch.int64), steered / 0.8).isfinite()
        assert torch.equal(ours, theirs), kwargs


logits = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40)


@settings(max_examples=100, deadline=None)
@given(logits, st.integers(0, 2**31), st.floats(-20, 20), st.floats(-50, 50))
def test_properties(values, seed, strength, shift):
    z = torch.tensor([values], dtype=torch.float64)
    b = z + torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=z.dtype)
    delta = ref.steering_vector(z, b)
    assert abs(float(delta.sum())) < 1e-12
    torch.testing.assert_close(ref.steering_vector(z + shift, b - shift), delta, atol=1e-9, rtol=0)
    kept = ref.steer(z, b, 0.0).isfinite()
    assert torch.equal(ref.steer(z, b, 0.0)[kept], z[kept])
    steered = ref.steer(z, b, strength)
    sampled, best = ref.sample(z, b, strength), ref.topk(z, b, strength, 1)
    assert torch.equal(sampled.token, best.token[:, 0])
    torch.testing.assert_close(sampled.logprob, best.logprob[:, 0])
    scored = ref.score(z, b, strength, sampled.token)
    torch.testing.assert_close(scored, steered.log_softmax(-1).amax(-1))
    order = torch.randperm(z.shape[1], generator=torch.Generator().manual_seed(seed))
    moved = order[ref.sample(z[:, order], b[:, order], strength).token]
    assert steered[0, moved] == steered.max()
