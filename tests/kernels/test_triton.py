"""The Triton operators against the reference: in the interpreter, or on a GPU if there is one."""

import math
import os

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from gpu_cases import impossible

from svd_engine.kernels import launch, reference
from svd_engine.kernels.triton_noise import gumbel_noise, random_bits
from tests import packed

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
ULP = 2.0**-22 if INTERPRETED else 2.0**-20  # a GPU's exp is good to a few float32 roundings
INF, NAN = math.inf, math.nan
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
POISON = 12345.0

pytestmark = [
    pytest.mark.skipif(launch.unavailable() is not None, reason=str(launch.unavailable())),
    # numpy, which the interpreter computes with, remarks on every -inf - -inf.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def logits(n, vocab, dtype=FLOAT, base_dtype=None, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, vocab, generator=generator) * spread
    b = z + torch.randn(n, vocab, generator=generator)
    return z.to(dtype).to(DEVICE), b.to(base_dtype or dtype).to(DEVICE)


def poisoned(n, vocab):
    return torch.full((launch.workspace_size(n, vocab),), NAN, device=DEVICE)


def steer(z, b, strength, alpha=0.1, penalty=-INF, dtype=FLOAT, lead=0):
    """The kernel's answer, written between columns that it must leave alone."""
    n, vocab = z.shape
    buffer = torch.full((n, lead + vocab + 8), POISON, dtype=dtype, device=DEVICE)
    before = buffer.clone()
    out = buffer[:, lead : lead + vocab]
    launch.steer(z, b, packed.mask(strength, alpha, penalty), out, workspace=poisoned(n, vocab))
    assert torch.equal(buffer[:, :lead], before[:, :lead])
    assert torch.equal(buffer[:, lead + vocab :], before[:, lead + vocab :])
    assert not (out == buffer.new_tensor(POISON)).any()
    return out


def sample(z, b, strength, alpha=0.1, penalty=-INF, temperature=0.0, seed=0, position=0):
    n, vocab = z.shape
    token = torch.full((n,), -9, device=DEVICE)
    logprob = torch.full((n,), POISON, device=DEVICE)
    by, draw = packed.mask(strength, alpha, penalty), packed.draw(temperature, seed, position)
    launch.sample(z, b, by, draw, token, logprob, workspace=poisoned(n, vocab))
    assert not (token == -9).any() and not (logprob == POISON).any()
    return reference.Sampled(token, logprob)


def assert_earned(kernel, reference32, truth, scale):
    """The kernel errs no more than plain float32, but for a rounding of `scale`."""
    kernel, reference32 = kernel.double(), reference32.double()
    assert torch.equal(kernel.isnan(), truth.isnan())
    assert torch.equal(kernel == -INF, truth == -INF)
    finite = truth.isfinite()
    allowed = (reference32 - truth).abs() + ULP * scale
    assert ((kernel - truth).abs() <= allowed)[finite].all()


def check(z, b, strength, alpha=0.1, penalty=-INF, temperature=0.0, seed=0, position=0, **options):
    """Both operators against float64 and the float32 reference; returns the sampled tokens."""
    mask = {"alpha": alpha, "penalty": penalty}
    mu = torch.as_tensor(strength, device=DEVICE)
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


@pytest.fixture
def narrow(monkeypatch):
    """Many tiles in a short row."""
    monkeypatch.setattr(launch, "TILE", 64)


@pytest.mark.parametrize("vocab", [1, 7, 100, 513, 5000, 50257])
def test_any_vocabulary(vocab):
    z, b = logits(1 if vocab > 5000 else 3, vocab)
    check(z, b, 2.0, temperature=0.8, seed=3, position=11)


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (HALF, HALF), (BF16, FLOAT), (FLOAT, HALF)])
def test_any_mix_of_dtypes(dtypes, narrow):
    check(*logits(2, 300, *dtypes), 3.0, temperature=0.7)


@pytest.mark.parametrize("dtype", [BF16, HALF])
def test_narrow_output(dtype, narrow):
    z, b = logits(2, 300)
    z[1, 3] = NAN
    out = steer(z, b, 3.0, penalty=-2.0, dtype=dtype)
    want = reference.steer(z, b, 3.0, penalty=-2.0)
    # The interpreter truncates to bfloat16 where a GPU rounds: one unit in the last place.
    unit = torch.finfo(dtype).eps * want[0].abs().clamp(min=2.0**-10)
    assert ((out[0].float() - want[0]).abs() <= unit).all()
    assert out[1].isnan().all()
    assert torch.equal(steer(z, b, 3.0, dtype=dtype) == -INF, reference.steer(z, b, 3.0) == -INF)


def test_strides_and_alignment(narrow):
    z, b = logits(2, 136, BF16)
    expected = check(z, b, 2.0)
    wide = torch.full((2, 147), NAN, dtype=BF16, device=DEVICE)
    for lead in (0, 1, 8):
        view = wide[:, lead : lead + 136]
        view.copy_(z)
        assert check(view, b, 2.0, lead=lead) == expected
    every_other = torch.full((4, 136), NAN, dtype=BF16, device=DEVICE)
    every_other[::2] = b
    assert check(z, every_other[::2], 2.0) == expected
    check(z, b[:1].expand(2, 136), 2.0, temperature=1.0)
    check(z[:1].expand(2, 136), b[:1].expand(2, 136), 2.0)


def test_offsets_beyond_31_bits(monkeypatch):
    if INTERPRETED:  # its copy back of the arguments would touch every byte of the storage
        executor = triton.runtime.interpreter.GridExecutor
        monkeypatch.setattr(executor, "_restore_args_dev", lambda *_: None)
    stride, vocab = 2**30 + 16, 100
    buffer = torch.empty(2 * stride + vocab, dtype=BF16, device=DEVICE)  # hardly any of it touched
    far = buffer.as_strided((3, vocab), (stride, 1))
    z, b = logits(3, vocab, BF16)
    far.copy_(z)
    assert sample(far, b, 2.0).token.tolist() == sample(z, b, 2.0).token.tolist()
    assert torch.equal(steer(far, b, 2.0), steer(z, b, 2.0))
    launch.steer(z, b, packed.mask(2.0), far)
    assert torch.equal(far.float(), steer(z, b, 2.0, dtype=BF16).float())


def test_no_rows():
    z, b = logits(0, 100)
    steer(z, b, 1.0)
    assert sample(z, b, 1.0).token.shape == (0,)


def test_the_workspace_may_be_larger_and_is_optional():
    z, b = logits(2, 300)
    out = torch.empty_like(z)
    for workspace in (None, torch.full((9999,), NAN, device=DEVICE)):
        launch.steer(z, b, packed.mask(2.0), out, workspace=workspace)
        assert torch.equal(out, steer(z, b, 2.0))


@pytest.mark.parametrize("strength", [-20.0, 0.0, 3.0, [-20.0, 0.0, 3.0]])
@pytest.mark.parametrize("penalty", [-INF, -2.0, 0.0])
def test_strengths_and_penalties(strength, penalty, narrow):
    if isinstance(strength, list):
        strength = torch.tensor(strength, device=DEVICE)
    for temperature in (0.0, 1.3):
        check(*logits(3, 150), strength, penalty=penalty, temperature=temperature)


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.5, 1.0])
def test_alphas(alpha, narrow):
    z, b = logits(3, 300, spread=1.0)
    z[1] = 0.25  # flat: every token is support at any alpha
    z[2] = z[2].round()  # many at the top
    for temperature in (0.0, 1.0):
        check(z, b, 2.0, alpha=alpha, temperature=temperature)


def test_ties_go_to_the_lowest_token(narrow):
    z, b = logits(4, 500)
    tied = [(7, 8), (3, 63), (63, 64), (100, 400)]
    for row, tokens in enumerate(tied):
        z[row, tokens], b[row, tokens] = 50.0, 48.0
    assert check(z, b, 3.0) == [first for first, _ in tied]
    z[:], b[:] = 1.0, 0.0
    assert check(z, b, 3.0) == [0] * 4


def test_minus_infinity(narrow):
    z, b = impossible(*logits(9, 150), tile=64)
    check(z, b, 3.0)
    check(z, b, 3.0, alpha=0.0, temperature=1.0)
    check(z, b, 3.0, penalty=-1.0, temperature=1.0)


def test_underflow_and_large_logits(narrow):
    z, b = logits(5, 300)
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
def test_invalid_rows_are_isolated(where, value, narrow):
    z, b = logits(5, 130)
    z[:, 70] = -INF
    clean = steer(z, b, 2.0), sample(z, b, 2.0)
    spoilt = {"adapted": z, "base": b}[where]
    spoilt[1, 0] = spoilt[1, 129] = value
    spoilt[2, 70] = value  # base: where the adapted row is -inf
    spoilt[3] = value
    for penalty in (-INF, -1.0):
        tokens = check(z, b, 2.0, penalty=penalty)
        assert tokens[1:4] == [-1, -1, -1]
    for row in (0, 4):
        assert torch.equal(steer(z, b, 2.0)[row], clean[0][row])
        assert sample(z, b, 2.0).token[row] == clean[1].token[row]


def test_a_row_of_minus_infinity_is_invalid():
    z, b = logits(2, 100)
    z[0] = -INF
    for alpha in (0.0, 0.1):
        assert check(z, b, 2.0, alpha=alpha)[0] == -1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_split_changes_roundings_only(temperature, monkeypatch):
    z, b = logits(2, 600, BF16)
    tokens, steered = [], []
    for tile in (16, 64, 256, 1024):
        monkeypatch.setattr(launch, "TILE", tile)
        tokens.append(sample(z, b, 4.0, temperature=temperature).token.tolist())
        steered.append(steer(z, b, 4.0))
    assert all(x == tokens[0] for x in tokens)
    for x in steered:
        assert torch.equal(x == -INF, steered[0] == -INF)
        torch.testing.assert_close(x, steered[0], rtol=1e-5, atol=1e-5)


def test_a_row_is_the_same_to_the_bit_in_any_batch(narrow):
    z, b = logits(5, 300)
    seeds = torch.arange(5, device=DEVICE)
    draw = {"penalty": -1.0, "temperature": 1.0}
    together = steer(z, b, 2.0), sample(z, b, 2.0, **draw, seed=seeds, position=9)
    for row in range(5):
        one = slice(row, row + 1)
        assert torch.equal(steer(z[one], b[one], 2.0)[0], together[0][row])
        alone = sample(z[one], b[one], 2.0, **draw, seed=row, position=9)
        assert alone.token[0] == together[1].token[row]
        assert alone.logprob[0] == together[1].logprob[row]


def test_sampling_follows_seed_and_position(narrow):
    n = 10
    z, b = (x.expand(n, 60) for x in logits(1, 60, spread=1.0))
    seeds = torch.arange(n, device=DEVICE) * 2**33 - 7
    positions = torch.arange(n, device=DEVICE) * 5 + 2**32
    draws = []
    # The interpreter, not the kernel, mistakes numbers between 2**31 and 2**32.
    for seed, position in (
        (seeds, positions), (seeds, 3), (2**62 + 1, positions), (-1, 2**33), (0, 0), (0, 1), (1, 0)
    ):  # fmt: skip
        draw = {"alpha": 0.05, "temperature": 1.5, "seed": seed, "position": position}
        draws.append(sample(z, b, 1.0, **draw).token.tolist())
        assert draws[-1] == reference.sample(z, b, 1.0, **draw).token.tolist()
    assert all(len(set(x)) > 4 for x in draws[:3])
    assert all(len(set(x)) == 1 for x in draws[3:])  # one seed, one position, one row: one draw
    assert draws[0] != draws[1] != draws[2]


@triton.jit
def _noise(seed, position, bits, given, out, n: tl.constexpr):
    token = tl.arange(0, n)
    word = random_bits(tl.load(seed), token, tl.load(position))
    tl.store(bits + token, word.to(tl.int64))
    tl.store(out + token, gumbel_noise(tl.load(given + token).to(tl.uint32)))


def test_noise_is_the_reference_s():
    n = 1024
    top = 2**32 - 1
    ends = torch.tensor([0, 1, 2, 2**8, 2**31 - 1, 2**31, 2**31 + 1, top - 2, top - 1, top])
    middle = (torch.linspace(0, 1, n - len(ends), dtype=torch.float64) * top).long()
    given = torch.cat([ends, middle])
    near = (torch.minimum(given, top - given).double() + 0.5) * 2.0**-32
    want = -torch.where(given < 2**31, -torch.log1p(-near), -near.log()).log()
    out, bits = torch.full((n,), NAN, device=DEVICE), torch.zeros(n, dtype=int, device=DEVICE)
    for seed, position in ((0, 0), (1, 2), (2**40 + 3, 2**35 + 1), (-5, 2**63 - 1)):
        seed, position = (torch.tensor([x], device=DEVICE) for x in (seed, position))
        _noise[(1,)](seed, position, bits, given.to(DEVICE), out, n)
        token = torch.arange(n)
        philox = reference.philox(seed.cpu().expand(n), token, position.cpu().expand(n))
        assert bits.tolist() == philox.tolist()
        torch.testing.assert_close(out.cpu().double(), want, rtol=2e-7, atol=3e-7)


@pytest.mark.skipif(not INTERPRETED, reason="counts the interpreter's loads")
def test_elements_read(narrow, monkeypatch):
    """The first pass reads a row once; the second only the tiles that can hold support."""
    vocab, tile = 64 * 20 + 5, 64
    z, b = logits(1, vocab, spread=0.1)
    b = b.clone()
    for token in (3, 40, 700):  # of tiles 0 and 10
        z[0, token] = 20.0
    builder = triton.runtime.interpreter.InterpreterBuilder
    original = builder.create_masked_load
    rows = [range(x.data_ptr(), x.data_ptr() + 4 * vocab) for x in (z, b)]
    read = [0, 0]

    def count(self, pointers, mask, *rest):
        for i, row in enumerate(rows):
            here = (pointers.data >= row.start) & (pointers.data < row.stop)
            read[i] += int((here & mask.data).sum())
        return original(self, pointers, mask, *rest)

    def reads(operator, *arguments, **options):
        read[:] = 0, 0
        operator(z, b, 2.0, *arguments, **options)
        assert read[0] == read[1]
        return read[0]

    monkeypatch.setattr(builder, "create_masked_load", count)
    assert reads(sample) == reads(sample, temperature=1.0) == reads(steer) == vocab + 2 * tile
    assert reads(sample, alpha=0.0) == reads(steer, penalty=-1.0) == 2 * vocab
