"""steer and sample of the CUDA C++ kernels against the reference in float64."""

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


def steer(z, b, strength, alpha=0.1, penalty=-INF, dtype=F32, lead=0):
    """The kernel's answer, written between columns that it must leave alone."""
    n, vocab = z.shape
    buffer = torch.full((n, lead + vocab + 8), POISON, dtype=dtype, device=z.device)
    before = buffer.clone()
    out = buffer[:, lead : lead + vocab]
    with_workspace(cuda.steer, z, b, packed.mask(strength, alpha, penalty), out)
    assert torch.equal(buffer[:, :lead], before[:, :lead])
    assert torch.equal(buffer[:, lead + vocab :], before[:, lead + vocab :])
    assert not (out == buffer.new_tensor(POISON)).any()
    return out


def sample(z, b, strength, alpha=0.1, penalty=-INF, temperature=0.0, seed=0, position=0):
    token = torch.full(z.shape[:1], -9, device=z.device)
    logprob = torch.full(z.shape[:1], POISON, device=z.device)
    by, draw = packed.mask(strength, alpha, penalty), packed.draw(temperature, seed, position)
    with_workspace(cuda.sample, z, b, by, draw, token, logprob)
    assert not (token == -9).any() and not (logprob == POISON).any()
    return reference.Sampled(token, logprob)


def check(z, b, strength, alpha=0.1, penalty=-INF, temperature=0.0, seed=0, position=0, **options):
    """Both operators against float64 and the float32 reference; returns the sampled tokens."""
    mask = {"alpha": alpha, "penalty": penalty}
    mu = torch.as_tensor(strength, device=z.device)
    difference = (z.double() - b.double()).nan_to_num(0, 0, 0).abs().max()
    scale = z.double().nan_to_num(0, 0, 0).abs().max() + mu.abs().max() * difference + 1
    if penalty > -INF:
        scale = scale + (mu.abs() * -penalty).max()
    truth = reference.steer(z.double(), b.double(), mu.double(), **mask)
    out = steer(z, b, strength, alpha, penalty, **options)
    assert_earned(out, reference.steer(z.float(), b.float(), mu, **mask), truth, scale)

    draw = {"temperature": temperature, "seed": seed, "position": position}
    got = sample(z, b, strength, alpha, penalty, **draw)
    want = reference.sample(z.float(), b.float(), mu, **mask, **draw)
    assert got.token.tolist() == want.token.tolist()
    chosen = got.token.clamp(min=0)[:, None]
    logprob = truth.log_softmax(-1).gather(-1, chosen)[:, 0]
    assert_earned(got.logprob, want.logprob, logprob, scale)
    return got.token.tolist()


@pytest.mark.parametrize("vocab", [1, 7, 8, 100, 2047, 2048, 2049, 5000, 50257, 151936])
def test_any_vocabulary(vocab, device):
    z, b = logits(1 if vocab > 5000 else 3, vocab, device)
    check(z, b, 2.0, temperature=0.8, seed=3, position=11)
    check(z, b, -3.0)


@pytest.mark.parametrize("adapted", [F32, BF16, F16])
@pytest.mark.parametrize("base", [F32, BF16, F16])
@pytest.mark.parametrize("vocab", [2304, 2301])  # 16-byte accesses or scalar ones
def test_any_mix_of_dtypes(adapted, base, vocab, device):
    z, b = logits(2, vocab, device, adapted, base)
    check(z, b, 3.0, temperature=0.7)
    b[1, 5] = NAN
    for penalty in (-INF, -2.0):
        wide = steer(z, b, 3.0, penalty=penalty)
        assert wide[1].isnan().all()
        for dtype in (BF16, F16):
            out = steer(z, b, 3.0, penalty=penalty, dtype=dtype)
            assert torch.equal(out.nan_to_num(9.0), wide.to(dtype).nan_to_num(9.0))


def test_strides_and_alignment(device):
    z, b = logits(2, 2056, device, BF16)
    expected = check(z, b, 2.0)
    wide = torch.full((2, 2080), NAN, dtype=BF16, device=device)
    for lead in (0, 1, 8):
        view = wide[:, lead : lead + 2056]
        view.copy_(z)
        assert check(view, b, 2.0, lead=lead) == expected
    odd = torch.full((4, 2057), NAN, dtype=BF16, device=device)[::2, :2056]
    odd.copy_(b)
    assert check(z, odd, 2.0) == expected
    check(z, b[:1].expand(2, 2056), 2.0, temperature=1.0)
    check(z[:1].expand(2, 2056), b[:1].expand(2, 2056), 2.0)


def test_offsets_beyond_31_bits(device):
    stride, vocab = 2**30 + 16, 100
    try:
        buffer = torch.empty(2 * stride + vocab, dtype=BF16, device=device)  # hardly any touched
    except RuntimeError as error:
        pytest.skip(str(error))
    far = buffer.as_strided((3, vocab), (stride, 1))
    z, b = logits(3, vocab, device, BF16)
    far.copy_(z)
    assert sample(far, b, 2.0).token.tolist() == sample(z, b, 2.0).token.tolist()
    want = steer(z, b, 2.0, dtype=BF16)
    cuda.steer(far, b, packed.mask(2.0), far)
    assert torch.equal(far, want)


@pytest.mark.parametrize("penalty", [-INF, -3.0])
def test_in_place(penalty, device):
    z, b = logits(2, 5000, device)
    want = steer(z, b, 3.0, penalty=penalty)
    for rows in (z.clone(), b), (z, b.clone()):
        out = rows[0] if rows[0] is not z else rows[1]
        cuda.steer(*rows, packed.mask(3.0, 0.1, penalty), out)
        assert torch.equal(out, want)


def test_no_rows_and_no_workspace(device):
    z, b = logits(0, 100, device)
    steer(z, b, 1.0)
    assert sample(z, b, 1.0).token.shape == (0,)
    z, b = logits(2, 300, device)
    out = torch.empty_like(z)
    cuda.steer(z, b, packed.mask(2.0), out)
    assert torch.equal(out, steer(z, b, 2.0))


@pytest.mark.parametrize("strength", [-20.0, 0.0, 3.0, [-20.0, 0.0, 3.0]])
@pytest.mark.parametrize("penalty", [-INF, -2.0, 0.0])
def test_strengths_and_penalties(strength, penalty, device):
    if isinstance(strength, list):
        strength = torch.tensor(strength, device=device)
    for temperature in (0.0, 1.3):
        check(*logits(3, 2500, device), strength, penalty=penalty, temperature=temperature)


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.5, 1.0])
def test_alphas(alpha, device):
    z, b = logits(3, 4500, device, spread=1.0)
    z[1] = 0.25  # flat: every token is support at any alpha
    z[2] = z[2].round()  # many at the top
    for temperature in (0.0, 1.0):
        check(z, b, 2.0, alpha=alpha, temperature=temperature)


@pytest.mark.parametrize("vocab", [4800, 4801])
def test_ties_go_to_the_lowest_token(vocab, device):
    z, b = logits(5, vocab, device)
    tied = [(7, 8), (3, 2047), (2047, 2048), (100, 4000), (1, 1024)]
    for row, tokens in enumerate(tied):
        z[row, tokens], b[row, tokens] = 50.0, 48.0
    assert check(z, b, 3.0) == [first for first, _ in tied]
    z[:], b[:] = 1.0, 0.0
    assert check(z, b, 3.0) == [0] * 5


@pytest.mark.parametrize("vocab", [4800, 4801])
def test_minus_infinity(vocab, device):
    z, b = impossible(*logits(9, vocab, device), tile=2048)
    check(z, b, 3.0)
    check(z, b, 3.0, alpha=0.0, temperature=1.0)
    check(z, b, 3.0, penalty=-1.0, temperature=1.0)


def test_underflow_and_large_logits(device):
    z, b = logits(5, 4500, device)
    z[0, 5] += 500.0  # p of the rest underflows
    z[1, 5] += 500.0
    b[1, 6] += 500.0
    z[2] -= 1e4
    b[3] += 1e4
    z[4], b[4] = z[4] * 1e30, b[4] * 1e30
    check(z, b, 3.0)
    check(z[:4], b[:4], 3.0, alpha=0.0, temperature=1.0)


@pytest.mark.parametrize("where", ["adapted", "base"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_invalid_rows_are_isolated(where, value, device):
    z, b = logits(6, 4500, device)
    z[:, 70] = -INF
    z[5] = -INF
    clean = steer(z, b, 2.0), sample(z, b, 2.0)
    spoilt = {"adapted": z, "base": b}[where]
    spoilt[1, 0] = spoilt[1, 4499] = value
    spoilt[2, 70] = value  # base: where the adapted row is -inf
    spoilt[3] = value
    for penalty, alpha in ((-INF, 0.1), (-1.0, 0.1), (-INF, 0.0)):
        tokens = check(z, b, 2.0, penalty=penalty, alpha=alpha)
        assert tokens[1:4] == [-1, -1, -1] and tokens[5] == -1
    for row in (0, 4):
        assert torch.equal(steer(z, b, 2.0)[row], clean[0][row])
        assert sample(z, b, 2.0).token[row] == clean[1].token[row]


@pytest.mark.parametrize("vocab", [6000, 6001])
def test_a_row_is_the_same_to_the_bit_in_any_batch(vocab, device):
    z, b = logits(5, vocab, device)
    seeds = torch.arange(5, device=device)
    draw = {"penalty": -1.0, "temperature": 1.0}
    together = steer(z, b, 2.0), sample(z, b, 2.0, **draw, seed=seeds, position=9)
    for row in range(5):
        one = slice(row, row + 1)
        assert torch.equal(steer(z[one], b[one], 2.0)[0], together[0][row])
        alone = sample(z[one], b[one], 2.0, **draw, seed=row, position=9)
        assert alone.token[0] == together[1].token[row]
        assert alone.logprob[0] == together[1].logprob[row]
    # So many rows that a block of `steer` takes two tiles, and four.
    for n in () if vocab % 8 else (700,) if device == "cpu" else (700, 2800):
        many = steer(z[:1].expand(n, vocab), b[:1].expand(n, vocab), 2.0)
        assert torch.equal(many, together[0][:1].expand(n, vocab))


def test_sampling_follows_seed_and_position(device):
    n = 10
    z, b = (x.expand(n, 60) for x in logits(1, 60, device, spread=1.0))
    seeds = torch.arange(n, device=device) * 2**33 - 7
    positions = torch.arange(n, device=device) * 5 + 2**32
    draws = []
    for seed, position in (
        (seeds, positions), (seeds, 3), (2**62 + 1, positions), (-1, 2**32 - 1), (0, 0), (0, 1)
    ):  # fmt: skip
        draw = {"alpha": 0.05, "temperature": 1.5, "seed": seed, "position": position}
        draws.append(sample(z, b, 1.0, **draw).token.tolist())
        assert draws[-1] == reference.sample(z, b, 1.0, **draw).token.tolist()
    assert all(len(set(x)) > 4 for x in draws[:3])
    assert all(len(set(x)) == 1 for x in draws[3:])  # one seed, one position, one row: one draw
