"""The Triton operators other than `steer` and `sample` against the reference."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

import triton
from gpu_cases import impossible

from svd_engine.kernels import launch, reference
from tests import packed
from tests.kernels.test_triton import (
    BF16,
    DEVICE,
    FLOAT,
    HALF,
    INF,
    INTERPRETED,
    NAN,
    POISON,
    assert_earned,
    logits,
    narrow,
    poisoned,
    pytestmark,
)  # fmt: skip

__all__ = ["narrow", "pytestmark"]  # of every test here


def empty(*shape, dtype=FLOAT):
    return torch.full(shape, -9 if dtype == torch.int64 else POISON, device=DEVICE).to(dtype)


def steering_vector(z, b, lead=0):
    """The kernel's answer, written between columns that it must leave alone."""
    n, vocab = z.shape
    buffer = empty(n, lead + vocab + 8)
    out = buffer[:, lead : lead + vocab]
    launch.steering_vector(z, b, out, workspace=poisoned(n, vocab))
    assert (buffer[:, :lead] == POISON).all() and (buffer[:, lead + vocab :] == POISON).all()
    return out


def divergence(z, b):
    out = empty(len(z))
    launch.divergence(z, b, out, workspace=poisoned(*z.shape))
    return out


def project_strength(z, b, target, alpha=0.1):
    n = len(z)
    outs = empty(n), empty(n), empty(n), empty(n, dtype=torch.bool)
    launch.project_strength(z, b, target, alpha, *outs, workspace=poisoned(*z.shape))
    return reference.Projection(*outs)


def score(z, b, target, strength, alpha=0.1, penalty=-INF):
    out = empty(len(z))
    by = packed.mask(strength, alpha, penalty)
    launch.score(z, b, by, target, out, workspace=poisoned(*z.shape))
    return out


def topk(z, b, strength, k, alpha=0.1, penalty=-INF):
    logprob, token = empty(len(z), k), empty(len(z), k, dtype=torch.int64)
    by = packed.mask(strength, alpha, penalty)
    launch.topk(z, b, by, k, logprob, token, workspace=poisoned(*z.shape))
    return reference.TopK(logprob, token)


def sample_cut(z, b, strength, draw, cuts, alpha=0.1, penalty=-INF):
    """draw: temperature, seed, position. cuts: top_k, top_p, min_p."""
    by, how = packed.mask(strength, alpha, penalty), packed.draw(*draw, *cuts)
    token, logprob = empty(len(z), dtype=torch.int64), empty(len(z))
    launch.sample(z, b, by, how, token, logprob, workspace=poisoned(*z.shape))
    assert not (logprob == POISON).any()
    return reference.Sampled(token, logprob)


def largest(x):
    return x.double().nan_to_num(0, 0, 0).abs().max()


def check_delta(z, b, alpha=0.1, target=None, lead=0):
    """`steering_vector`, `divergence`, `project_strength`: what no strength enters."""
    z64, b64, z32, b32 = z.double(), b.double(), z.float(), b.float()
    scale = largest(z64 - b64) + 1
    truth = reference.steering_vector(z64, b64)
    delta = steering_vector(z, b, lead)
    assert_earned(delta, reference.steering_vector(z32, b32), truth, scale)

    # Common shifts of a row cancel: they are no part of the scale.
    centred = (x - x.nan_to_num(0, 0, 0).amax(-1, keepdim=True) for x in (z64, b64))
    spread = sum(largest(x) for x in centred) + 1
    want = reference.divergence(z64, b64)
    got = divergence(z, b)
    assert torch.equal(got == INF, want == INF)
    assert_earned(got, reference.divergence(z32, b32), want, spread)

    if target is None:
        target = torch.arange(len(z), device=DEVICE) * 5 % z.shape[1]
    want = reference.project_strength(z64, b64, target, alpha=alpha)
    plain = reference.project_strength(z32, b32, target, alpha=alpha)
    got = project_strength(z, b, target, alpha)
    assert got.in_support.tolist() == want.in_support.tolist()
    reach = largest(truth)
    assert_earned(got.numerator, plain.numerator, want.numerator, scale)
    assert_earned(got.gauss_newton, plain.gauss_newton, want.gauss_newton, scale * (reach + scale))
    assert_earned(got.newton, plain.newton, want.newton, scale * (reach + scale))


def check_steered(z, b, strength, alpha=0.1, penalty=-INF, k=4, target=None):
    """`score` and `topk`."""
    z64, b64, z32, b32 = z.double(), b.double(), z.float(), b.float()
    mu = torch.as_tensor(strength, device=DEVICE)
    mask = {"alpha": alpha, "penalty": penalty}
    scale = largest(z) + largest(mu) * largest(z64 - b64) + 1
    if penalty > -INF:
        scale = scale + largest(mu) * -penalty
    if target is None:
        target = torch.arange(len(z), device=DEVICE) * 7 % z.shape[1]
    want = reference.score(z64, b64, mu.double(), target, **mask)
    plain = reference.score(z32, b32, mu, target, **mask)
    assert_earned(score(z, b, target, strength, alpha, penalty), plain, want, scale)

    plain, got = reference.topk(z32, b32, mu, k, **mask), topk(z, b, strength, k, alpha, penalty)
    every = reference.steer(z64, b64, mu.double(), **mask).log_softmax(-1)
    want = every.gather(-1, got.token.clamp(min=0))
    assert_earned(got.logprob, plain.logprob, want, scale)
    if INTERPRETED:
        assert got.token.tolist() == plain.token.tolist()
    for tokens in got.token.tolist():
        assert tokens == [-1] * k or len({x for x in tokens if 0 <= x < z.shape[1]}) == k


CUTS = [(3, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.2), (6, 0.6, 0.02), (1, 0.3, 1.0), (0, 0.0, 0.0)]


def check_cut(z, b, strength, cuts=CUTS, alpha=0.1, penalty=-INF, temperature=1.5):
    mu = torch.as_tensor(strength, device=DEVICE)
    position = torch.arange(len(z), device=DEVICE) * 3
    for top_k, top_p, min_p in cuts:
        got = sample_cut(
            z, b, strength, (temperature, 5, position), (top_k, top_p, min_p), alpha, penalty
        )
        want = reference.sample(
            z.float(), b.float(), mu, alpha=alpha, penalty=penalty, temperature=temperature,
            top_k=top_k, top_p=top_p, min_p=min_p, seed=5, position=position,
        )  # fmt: skip
        assert got.token.tolist() == want.token.tolist()
        every = reference.steer(z.double(), b.double(), mu.double(), alpha=alpha, penalty=penalty)
        truth = every.log_softmax(-1).gather(-1, got.token.clamp(min=0)[:, None])[:, 0]
        scale = largest(z) + largest(mu) * largest(z.double() - b.double()) + 1
        assert_earned(got.logprob, want.logprob, truth, scale)


def check(z, b, strength=2.0, **mask):
    check_delta(z, b, mask.get("alpha", 0.1))
    check_steered(z, b, strength, **mask)
    check_cut(z, b, strength, CUTS[3:4], **mask)


@pytest.mark.parametrize("vocab", [1, 7, 100, 5000])
def test_any_vocabulary(vocab):
    z, b = logits(2, vocab)
    check_delta(z, b)
    check_steered(z, b, 2.0, k=min(4, vocab))
    check_cut(z, b, 2.0, CUTS[3:])


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (HALF, FLOAT)])
def test_any_mix_of_dtypes(dtypes, narrow):
    check(*logits(2, 200, *dtypes))


def test_strides_and_alignment(narrow):
    z, b = logits(2, 136, BF16)
    wide = torch.full((2, 147), NAN, dtype=BF16, device=DEVICE)
    for lead in (0, 1):
        view = wide[:, lead : lead + 136]
        view.copy_(z)
        check(view, b)
        assert torch.equal(steering_vector(view, b, lead), steering_vector(z, b))
    check(z, b[:1].expand(2, 136))
    targets = torch.arange(4, device=DEVICE)[::2]
    assert torch.equal(score(z, b, targets, 2.0), score(z, b, targets.contiguous(), 2.0))


def test_no_rows():
    z, b = logits(0, 100)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert steering_vector(z, b).shape == (0, 100)
    assert divergence(z, b).shape == score(z, b, none, 1.0).shape == (0,)
    assert topk(z, b, 1.0, 3).token.shape == (0, 3)
    project_strength(z, b, none)
    sample_cut(z, b, 1.0, (1.0, 0, 0), (3, 1.0, 0.0))


@pytest.mark.parametrize(
    ("alpha", "penalty"), [(0.0, -INF), (0.0, -2.0), (0.1, -INF), (0.1, -2.0), (1.0, 0.0)]
)
def test_masks_and_strengths(alpha, penalty, narrow):
    z, b = logits(3, 150)
    z[2] *= 0.2
    strength = torch.tensor([-20.0, 0.0, 3.0], device=DEVICE)
    check_steered(z, b, strength, alpha, penalty, k=7)
    check_steered(z, b, -5.0, alpha, penalty, target=z.argmax(-1))
    check_cut(z, b, strength, CUTS[2:4], alpha, penalty)


@pytest.mark.parametrize("alpha", [0.0, 1e-4, 0.5])
def test_projections(alpha, narrow):
    z, b = logits(4, 300)
    z[1] = 0.25  # flat: every token is support
    z[2, 100] = 40.0  # near-certain: p of the rest is 1e-14, and so is the variance
    z[3, 100] = 12.0
    for target in (z.argmax(-1), z.argmin(-1)):
        check_delta(z, b, alpha, target)
        got = project_strength(z, b, target, alpha)
        want = reference.project_strength(z.double(), b.double(), target, alpha=alpha)
        for row in (0, 1, 3):  # in proportion too
            torch.testing.assert_close(
                got.newton[row].double(), want.newton[row], rtol=2e-5, atol=0
            )


def test_the_mass_off_the_support_keeps_its_digits(narrow):
    """All but one of the tokens hold 1e-6 of the mass, and the support is pushed below them."""
    z, b = logits(1, 300, spread=0.5)
    z[0, 70] += 18.0
    b[0, 70] = z[0, 70] - 30.0
    target = torch.tensor([200], device=DEVICE)
    for strength in (1e6, 3e6):
        steered = reference.steer(z.double(), b.double(), strength, penalty=0.0)
        assert steered[0, 70] < steered[0, 200]
        check_steered(z, b, strength, penalty=0.0, target=target)


def test_topk_takes_every_token(narrow):
    z, b = logits(3, 80)
    z[0, 40:75] = z[0, 30]  # of one logit, some of one delta
    b[0, 40:70:3] = b[0, 30]
    z[1, :70] = -INF
    z[2] = b[2] = 1.0
    for alpha, penalty in ((0.1, -INF), (0.0, -INF), (0.1, -1.0)):
        check_steered(z, b, 3.0, alpha, penalty, k=80)
    order = topk(z, b, 3.0, 80, 1.0).token[2]
    assert order.tolist() == list(range(80))


def test_ties_at_the_cut(narrow):
    z, b = logits(3, 200)
    for row, tokens in enumerate([(3, 63, 64), (100, 130, 140, 199), (9,)]):
        z[row, tokens], b[row, tokens] = 30.0, 28.0
    z[2] = b[2] = 0.0
    kept = [{3, 63}, {100, 130}, {0, 1}]
    for seed, cuts in itertools.product(range(3), [(2, 1.0, 0.0), (0, 0.4, 0.0)]):
        token = sample_cut(z, b, 1.0, (1.0, seed, 1), cuts).token.tolist()
        if cuts[0]:
            assert all(x in among for x, among in zip(token, kept, strict=True))
        else:  # 2 of 3, 2 of 4, 80 of 200
            assert token[0] in kept[0] and token[1] in kept[1] and token[2] < 81
    check_cut(z, b, 1.0, [(2, 1.0, 0.0), (150, 1.0, 0.0), (0, 0.4, 0.5)])


def test_cuts_of_large_supports(narrow):
    z, b = logits(3, 300, spread=0.5)
    z[1], z[2] = z[1] * 1e6, z[2].round()
    check_cut(z, b, 1.0, [(133, 1.0, 0.0), (0, 0.93, 0.3)], alpha=0.0)
    check_cut(z[:1], b[:1], 1.0, [(0, 0.5, 0.0)], alpha=0.0, penalty=0.0, temperature=0.01)


def test_minus_infinity(narrow):
    z, b = impossible(*logits(9, 150), tile=64)
    check(z, b, 3.0)
    check(z, b, 3.0, alpha=0.0, penalty=-1.0)


def test_shifts_and_underflow(narrow):
    z, b = logits(5, 300)
    z[0, 5] += 500.0
    b[1, 6] += 500.0
    z[2] -= 1e4
    b[3] += 1e4
    z[4], b[4] = 0.0, 0.0
    check(z, b, 3.0)


@pytest.mark.parametrize("where", ["adapted", "base"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_invalid_rows_are_isolated(where, value, narrow):
    z, b = logits(4, 70)
    z[:, 65] = -INF
    clean = topk(z, b, 2.0, 3), divergence(z, b)
    spoilt = {"adapted": z, "base": b}[where]
    spoilt[1, 3] = value
    spoilt[2, 65] = value
    for mask in ({}, {"alpha": 0.0, "penalty": -1.0}):
        check(z, b, **mask)
    got = topk(z, b, 2.0, 3), divergence(z, b)
    for row in (0, 3):
        assert torch.equal(got[0].logprob[row], clean[0].logprob[row])
        assert got[1][row] == clean[1][row]


def test_a_target_outside_the_vocabulary_reads_nothing():
    z, b = logits(2, 100)
    target = torch.tensor([-1, 100], device=DEVICE)
    assert score(z, b, target, 1.0).isnan().all()
    assert not project_strength(z, b, target).in_support.any()


@pytest.mark.parametrize("tile", [16, 64, 1024])
def test_the_split_changes_roundings_only(tile, monkeypatch):
    monkeypatch.setattr(launch, "TILE", tile)
    check(*logits(2, 400, BF16), strength=4.0)


def test_a_row_is_the_same_to_the_bit_in_any_batch(narrow):
    z, b = logits(3, 300)
    target = torch.arange(3, device=DEVICE)

    def everything(z, b, target):
        yield steering_vector(z, b)
        yield divergence(z, b)
        yield from project_strength(z, b, target)
        for alpha, penalty in ((0.1, -1.0), (0.0, -INF)):
            yield score(z, b, target, 2.0, alpha, penalty)
            yield from topk(z, b, 2.0, 5, alpha, penalty)
            yield from sample_cut(z, b, 2.0, (1.0, target, 3), (9, 0.9, 0.01), alpha, penalty)

    together = list(everything(z, b, target))
    for row in range(3):
        one = slice(row, row + 1)
        alone = everything(z[one], b[one], target[one])
        assert all(torch.equal(x[one], y) for x, y in zip(together, alone, strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="counts the interpreter's loads")
def test_elements_read(narrow, monkeypatch):
    """One read of a row, and then the tiles with support; off it the sums of the tiles suffice."""
    vocab, tile = 64 * 10 + 5, 64
    z, b = logits(1, vocab, spread=0.1)
    z[0, [3, 40, 500]] = 20.0  # of tiles 0 and 7
    row = range(z.data_ptr(), z.data_ptr() + 4 * vocab)
    target = torch.tensor([9])
    builder = triton.runtime.interpreter.InterpreterBuilder
    original = builder.create_masked_load
    read = [0]

    def count(self, pointers, mask, *rest):
        here = (pointers.data >= row.start) & (pointers.data < row.stop)
        read[0] += int((here & mask.data).sum())
        return original(self, pointers, mask, *rest)

    def reads(operator, *arguments):
        read[0] = 0
        operator(z, b, *arguments)
        return read[0]

    monkeypatch.setattr(builder, "create_masked_load", count)
    assert reads(divergence) == vocab
    assert reads(steering_vector) == 2 * vocab
    assert reads(project_strength, target) == vocab + 2 * tile + 1
    assert reads(score, target, 2.0) == reads(score, target, 2.0, 0.1, 0.0) == vocab + 2 * tile + 1
    assert reads(score, target, 2.0, 0.0) == 2 * vocab + 1
    # Two to open the tournament, one for each token that is picked.
    assert reads(topk, 2.0, 3) == vocab + 5 * tile
