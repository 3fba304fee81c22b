"""The other operators of the CUDA C++ kernels against the reference in float64."""

import pytest
import torch
from gpu_cases import impossible

from svd_engine.kernels import reference
from svd_engine.ops import cuda
from tests import cuda_device, packed
from tests.cuda_device import (
    BF16,
    F16,
    F32,
    INF,
    NAN,
    POISON,
    assert_earned,
    logits,
    with_workspace,
)

device, emulated = cuda_device.device, cuda_device.emulated  # fixtures
TINY = 1e-20  # below it float32 exponentials are 0 for some


def poisoned(z, *size, dtype=F32):
    value = {torch.int64: -9, torch.bool: True}.get(dtype, POISON)
    return torch.full((len(z), *size), value, dtype=dtype, device=z.device)


def topk(z, b, strength, k, alpha=0.1, penalty=-INF):
    logprob, token = poisoned(z, k), poisoned(z, k, dtype=torch.int64)
    with_workspace(cuda.topk, z, b, packed.mask(strength, alpha, penalty), k, logprob, token)
    assert not (token == -9).any() and not (logprob == POISON).any()
    return reference.TopK(logprob, token)


def score(z, b, target, strength, alpha=0.1, penalty=-INF):
    logprob = poisoned(z)
    with_workspace(cuda.score, z, b, packed.mask(strength, alpha, penalty), target, logprob)
    return logprob


def project_strength(z, b, target, alpha=0.1):
    outputs = *(poisoned(z) for _ in range(3)), poisoned(z, dtype=torch.bool)
    with_workspace(cuda.project_strength, z, b, target, alpha, *outputs)
    return reference.Projection(*outputs)


def divergence(z, b):
    out = poisoned(z)
    with_workspace(cuda.divergence, z, b, out)
    return out


def steering_vector(z, b):
    out = poisoned(z, z.shape[1])
    with_workspace(cuda.steering_vector, z, b, out)
    return out


def check_topk(z, b, strength, k, wide, scale, **mask):
    got = topk(z, b, strength, k, **mask)
    steered = reference.steer(*wide, torch.as_tensor(strength).double(), **mask)
    truth, want = steered.log_softmax(-1), reference.topk(*wide, strength, k, **mask)
    dead = want.token[:, 0] < 0
    assert (got.token[dead] == -1).all() and got.logprob[dead].isnan().all()
    got, want = (reference.TopK(x.logprob[~dead], x.token[~dead]) for x in (got, want))
    truth = truth[~dead]
    removed = want.logprob == -INF
    assert torch.equal(got.token[removed], want.token[removed])
    assert all(len(set(x)) == k for x in got.token.tolist())
    assert_earned(got.logprob, want.logprob, want.logprob.double(), scale)
    assert_earned(got.logprob, want.logprob, truth.gather(-1, got.token), scale)


def check(z, b, strength, target=None, *, alpha=0.1, penalty=-INF, k=5):
    """Every operator of this file against float64 and the float32 reference."""
    mask = {"alpha": alpha, "penalty": penalty}
    mu = torch.as_tensor(strength, device=z.device)
    if target is None:  # the greatest, the first and the last, in turn
        ends = z.nan_to_num(-INF, -INF, -INF).argmax(-1), *(0 * z[:, 0], 0 * z[:, 0] + 1)
        last = torch.full((len(z),), z.shape[1] - 1, device=z.device)
        turn = torch.arange(len(z), device=z.device) % 3
        target = torch.where(turn == 0, ends[0], torch.where(turn == 1, 0, last))
    narrow, wide = (z.float(), b.float()), (z.double(), b.double())
    both = z.isfinite() & b.isfinite()
    far = torch.where(both, wide[0] - wide[1], 0).abs().amax(-1)
    scale = z.double().nan_to_num(0, 0, 0).abs().amax(-1) + mu.abs() * far + 1
    if penalty > -INF:
        scale = scale + mu.abs() * -penalty

    truth = reference.score(*wide, mu.double(), target, **mask)
    assert_earned(
        score(z, b, target, strength, **mask), reference.score(*narrow, mu, target, **mask),
        truth, scale,
    )  # fmt: skip
    check_topk(z, b, strength, min(k, z.shape[1]), wide, scale.max(), **mask)

    got = project_strength(z, b, target, alpha)
    same, truth = (reference.project_strength(*x, target, alpha=alpha) for x in (narrow, wide))
    for name, size in ("numerator", far), ("gauss_newton", far**2), ("newton", far**2):
        assert_earned(*(getattr(x, name) for x in (got, same, truth)), size + TINY)
    assert torch.equal(got.in_support, same.in_support)

    vector, same, truth = (
        steering_vector(z, b), reference.steering_vector(*narrow), reference.steering_vector(*wide)
    )  # fmt: skip
    assert_earned(vector, same, truth, far[:, None] + TINY)
    kl, same, truth = divergence(z, b), reference.divergence(*narrow), reference.divergence(*wide)
    assert torch.equal(kl == INF, truth == INF)
    assert_earned(kl, same, truth, 1 + truth.abs().nan_to_num(0, 0, 0))


@pytest.mark.parametrize("vocab", [1, 7, 8, 100, 2047, 2048, 2049, 5000, 50257, 151936])
def test_any_vocabulary(vocab, device):
    z, b = logits(1 if vocab > 5000 else 3, vocab, device)
    check(z, b, 2.0)
    check(z, b, -3.0, penalty=0.0, k=2)


@pytest.mark.parametrize("adapted", [F32, BF16, F16])
@pytest.mark.parametrize("base", [F32, BF16, F16])
@pytest.mark.parametrize("vocab", [2304, 2301])  # 16-byte accesses or scalar ones
def test_any_mix_of_dtypes(adapted, base, vocab, device):
    z, b = logits(3, vocab, device, adapted, base)
    b[2, 5] = NAN
    check(z, b, 3.0, penalty=-2.0)


def test_strides_and_alignment(device):
    z, b = logits(3, 2056, device, BF16)
    target = torch.tensor([5, 9, 70, 9, 1, 9], device=device)[::2]

    def answers(z, b):
        draw = 1.0, 3, 0.9, 0.0, 4, 5
        return torch.cat([
            score(z, b, target, 2.0)[:, None], divergence(z, b)[:, None], topk(z, b, 2.0, 4).token,
            project_strength(z, b, target).newton[:, None], cut(z, b, 2.0, 0.1, *draw)[:, None],
        ], 1)  # fmt: skip

    expected = answers(z, b)
    check(z, b, 2.0, target)
    wide = torch.full((6, 2081), NAN, dtype=BF16, device=device)
    for lead in (0, 1, 8):
        view = wide[::2, lead : lead + 2056]
        view.copy_(z)
        torch.testing.assert_close(answers(view, b), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(steering_vector(view, b), steering_vector(z, b))
    check(z[:1].expand(6, 2056), b[:1].expand(6, 2056), 2.0)


def test_no_rows_and_no_workspace(device):
    z, b = logits(0, 100, device)
    target = torch.empty(0, dtype=torch.int64, device=device)
    check_shapes = score(z, b, target, 1.0), divergence(z, b), topk(z, b, 1.0, 3).token
    assert [list(x.shape) for x in check_shapes] == [[0], [0], [0, 3]]
    z, b = logits(2, 300, device)
    out = torch.empty(2, device=device)
    cuda.divergence(z, b, out)
    assert torch.equal(out, divergence(z, b))


def test_offsets_beyond_31_bits(device):
    stride, vocab = 2**30 + 16, 100
    try:
        buffer = torch.empty(2 * stride + vocab, dtype=BF16, device=device)  # hardly any touched
    except RuntimeError as error:
        pytest.skip(str(error))
    far = buffer.as_strided((3, vocab), (stride, 1))
    z, b = logits(3, vocab, device, BF16)
    far.copy_(z)
    target = torch.tensor([0, 5, 99], device=device)
    assert torch.equal(score(far, b, target, 2.0, 0.0), score(z, b, target, 2.0, 0.0))
    assert torch.equal(divergence(b, far), divergence(b, z))


@pytest.mark.parametrize("strength", [-20.0, 0.0, 3.0, [-20.0, 0.0, 3.0]])
@pytest.mark.parametrize("penalty", [-INF, -2.0, 0.0])
def test_strengths_and_penalties(strength, penalty, device):
    if isinstance(strength, list):
        strength = torch.tensor(strength, device=device)
    check(*logits(3, 4500, device), strength, penalty=penalty)


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.5, 1.0])
@pytest.mark.parametrize("penalty", [-INF, -2.0])
def test_alphas(alpha, penalty, device):
    z, b = logits(3, 4500, device, spread=1.0)
    z[1] = 0.25  # flat: every token is support at any alpha
    z[2] = z[2].round()  # many at the top
    check(z, b, 2.0, alpha=alpha, penalty=penalty)


@pytest.mark.parametrize("vocab", [4800, 4801])
def test_minus_infinity(vocab, device):
    z, b = impossible(*logits(9, vocab, device), tile=2048)
    check(z, b, 3.0)
    check(z, b, 3.0, alpha=0.0, k=30)
    check(z[5:], b[5:], 3.0, k=2500)  # most of them removed
    check(z, b, 3.0, penalty=-1.0)


def test_underflow_and_large_logits(device):
    z, b = logits(6, 4500, device)
    z[0, 5] += 500.0  # p of the rest underflows
    z[1, 5] += 500.0
    b[1, 6] += 500.0
    z[2] -= 1e4
    b[3] += 1e4
    z[4], b[4] = z[4] * 1e15, b[4] * 1e15
    b[5, 7], z[5, 8] = -INF, z[5].max() + 300.0  # p of token 7 is 0 but for rounding
    check(z, b, 3.0)
    check(z[:4], b[:4], 3.0, alpha=0.0)


@pytest.mark.parametrize("where", ["adapted", "base"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_invalid_rows_are_isolated(where, value, device):
    z, b = logits(6, 4500, device)
    z[:, 70] = -INF
    z[5] = -INF
    clean = divergence(z, b), topk(z, b, 2.0, 9)
    spoilt = {"adapted": z, "base": b}[where]
    spoilt[1, 0] = spoilt[1, 4499] = value
    spoilt[2, 70] = value  # base: where the adapted row is -inf
    spoilt[3] = value
    target = torch.tensor([3, 3, 70, 3, 3, 3], device=device)
    for penalty, alpha in ((-INF, 0.1), (-1.0, 0.1), (-INF, 0.0)):
        check(z, b, 2.0, target, penalty=penalty, alpha=alpha)
        tokens = cut(z, b, 2.0, alpha, 1.0, 3, 0.9, 0.1, penalty=penalty)
        assert (tokens == -1).tolist() == [False, True, True, True, False, True]
    for row in (0, 4):
        assert divergence(z, b)[row] == clean[0][row]
        assert torch.equal(topk(z, b, 2.0, 9).token[row], clean[1].token[row])


def test_a_strength_or_target_that_is_none(device):
    z, b = logits(3, 4500, device)
    strength = torch.tensor([NAN, 1.0, 1.0], device=device)
    target = torch.tensor([0, -1, 4500], device=device)
    assert score(z, b, target, strength).isnan().all()
    assert project_strength(z, b, target).numerator.isnan().tolist() == [False, True, True]
    assert not project_strength(z, b, target).in_support[1:].any()
    assert (topk(z, b, strength, 3).token[:, 0] == -1).tolist() == [True, False, False]


@pytest.mark.parametrize("k", [1, 2, 40, 300])
def test_topk_orders_ties_and_fills_up_with_the_removed(k, device):
    z, b = logits(6, 4801, device)
    z[0, 4700], z[0, 30], z[0, 2100] = 50.0, 50.0, 49.0
    b[0] = z[0]
    z[1], b[1] = 1.0, 0.0
    z[2] = b[2] = (torch.rand(4801, device=device) * 3).round()
    z[3, 40:] = b[3, 40:] = -INF
    z[4, :4000] = -INF
    z[5, ::2], z[5, 1::2], b[5] = 0.0, -0.0, 0.0  # equal
    for alpha in (0.0, 0.9):
        want = reference.topk(z.double(), b.double(), 2.0, k, alpha=alpha)
        got = topk(z, b, 2.0, k, alpha)
        assert torch.equal(got.token, want.token)
        assert_earned(got.logprob, want.logprob, want.logprob, 20.0)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_topk_of_the_whole_vocabulary(alpha, device):
    z, b = logits(2, 700, device, spread=1.0)
    z[1, 5] = NAN
    check(z, b, 2.0, alpha=alpha, k=700)


def cut(z, b, strength, alpha, temperature, k, p, m, seed=0, position=0, penalty=-INF):
    """The tokens; their log-probabilities are those of `score`."""
    token, logprob = poisoned(z, dtype=torch.int64), poisoned(z)
    draw = packed.draw(temperature, seed, position, k, p, m)
    by = packed.mask(strength, alpha, penalty)
    with_workspace(cuda.sample, z, b, by, draw, token, logprob)
    again = score(z, b, token, strength, alpha, penalty)
    torch.testing.assert_close(logprob, again, rtol=1e-5, atol=1e-5, equal_nan=True)
    return token


def reference_cut(z, b, strength, alpha, temperature, k, p, m, seed=0, position=0, penalty=-INF):
    return reference.sample(
        z.double(), b.double(), strength, alpha=alpha, penalty=penalty, temperature=temperature,
        top_k=k, top_p=p, min_p=m, seed=seed, position=position,
    ).token  # fmt: skip


CUTS = [(3, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.2), (4, 0.7, 0.05), (1, 1.0, 0.0), (0, 1e-6, 0.0),
        (0, 1.0, 1.0), (10**9, 0.999, 1e-9), (0, 1.0, 0.0)]  # fmt: skip


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("alpha", [0.0, 0.01])  # all tokens, a few
def test_cuts(cuts, alpha, device):
    z, b = (x.repeat(3, 1) for x in logits(2, 2500, device))
    seeds = torch.arange(6, device=device)
    for temperature, penalty in ((1.0, -INF), (2.5, -1.0)):
        draw = temperature, *cuts, seeds, 7
        got = cut(z, b, 2.0, alpha, *draw, penalty)
        assert got.tolist() == reference_cut(z, b, 2.0, alpha, *draw, penalty).tolist()


@pytest.mark.parametrize("vocab", [40, 1200])  # fits the list, or not
def test_cuts_keep_the_lowest_of_equals(vocab, device):
    n = 20
    z = torch.zeros(n, vocab, device=device)
    z[:, ::2] = 1.0
    z[:, 2::4] = -0.0
    seeds = torch.arange(n, device=device)
    fours = vocab // 4
    share = 1 / (fours + 3 * fours / torch.e)  # of a token at 1
    for cuts, kept in {
        (5, 1.0, 0.0): [0, 4, 8, 12, 16],
        (fours + 2, 1.0, 0.0): [*range(0, vocab, 4), 1, 2],
        (0, 2.5 * share, 0.0): [0, 4, 8],
        (0, fours * share + 1.5 * share / torch.e, 0.0): [*range(0, vocab, 4), 1, 2],
        (0, 1.0, 0.9): [*range(0, vocab, 4)],
    }.items():
        tokens = cut(z, z, 3.0, 0.0, 1.0, *cuts, seeds).tolist()
        assert set(tokens) <= set(kept) and len(set(tokens)) > 1
        assert tokens == reference_cut(z, z, 3.0, 0.0, 1.0, *cuts, seeds).tolist()


def test_without_temperature_nothing_is_cut(device):
    z, b = logits(3, 2500, device)
    tokens = cut(z, b, 2.0, 0.1, 0.0, 1, 0.1, 0.9)
    assert tokens.tolist() == reference.sample(z, b, 2.0).token.tolist()


@pytest.mark.parametrize("vocab", [6000, 6001])
def test_a_row_is_the_same_to_the_bit_in_any_batch(vocab, device):
    z, b = logits(5, vocab, device)
    target, seeds = torch.arange(5, device=device) * 1000, torch.arange(5, device=device)

    def answers(rows):
        x, y, at = z[rows], b[rows], target[rows]
        draw = 0.7, 0, 0.8, 0.0, seeds[rows]
        best = topk(x, y, 2.0, 20, penalty=-1.0)
        return (
            score(x, y, at, 2.0, penalty=-1.0), best.logprob, best.token,
            *project_strength(x, y, at, 1e-3), divergence(x, y), steering_vector(x, y),
            cut(x, y, 2.0, 0.0, *draw), cut(x, y, 2.0, 1e-3, *draw),
        )  # fmt: skip

    together = answers(slice(0, 5))
    for row in range(5):
        for alone, all_rows in zip(answers(slice(row, row + 1)), together, strict=True):
            assert torch.equal(alone[0], all_rows[row])
