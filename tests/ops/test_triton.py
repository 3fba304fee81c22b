"""The Triton kernels where they are not as other backends: tiles, reads, noise, workspace."""

import pytest
import torch
from hypothesis import example
from hypothesis import given as given_any
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton
import triton.language as tl

from svd_engine import ops
from svd_engine.kernels import launch, reference, triton_blocks, triton_measure
from svd_engine.kernels.triton_noise import gumbel_noise, random_bits

from . import packed
from .cases import BF16, INF, NAN, OPERATORS, absent, logits, options
from .oracle import same
from .runners import HERE, INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"

pytestmark = [
    pytest.mark.skipif(launch.unavailable() is not None, reason=str(launch.unavailable())),
    # numpy, which the interpreter computes with, remarks on every -inf - -inf.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture
def running():
    """The operators on Triton with the smallest tiles."""
    runner = min((x for x in HERE if x.backend == "triton"), key=lambda x: x.tile)
    with runner.running():
        yield


def answers(z, b, **given):
    o = options(z, **given)
    found = [name for name in OPERATORS if absent(name, "triton", DEVICE) is None]
    return {name: OPERATORS[name].run(z, b, o, "triton", None) for name in found}


def test_the_workspace_may_be_larger_and_is_optional():
    z, b = logits(2, 300, DEVICE)
    out, want = torch.empty_like(z), torch.empty_like(z)
    mask, larger = packed.mask(2.0), torch.full((9999,), NAN, device=DEVICE)
    launch.steer(z, b, mask, want, workspace=larger)
    launch.steer(z, b, mask, out)
    assert torch.equal(out, want)


@given_any(st.integers(1, 2**20), st.integers(0, 2**31 - 1))
@example(1, 2**31 - 1)
@example(75, 75 * 28633114 - 1)
def test_a_reciprocal_divides_exactly(divisor, number):
    factor, shift = launch.reciprocal(divisor)
    assert factor < 2**32
    for n in (number, number // divisor * divisor, max(number // divisor * divisor - 1, 0)):
        assert (2 * n * factor >> 32) >> shift == n // divisor


@pytest.mark.slow
@pytest.mark.parametrize("given", [{}, {"alpha": 0.0, "temperature": 1.0, "penalty": -1.0}])
def test_the_split_changes_roundings_only(given, monkeypatch):
    z, b = logits(2, 150, DEVICE, BF16)
    monkeypatch.setattr(launch, "TILE", 1024)
    whole = answers(z, b, mu=4.0, k=4, **given)
    for tile in (16, 64):
        monkeypatch.setattr(launch, "TILE", tile)
        for name, outputs in answers(z, b, mu=4.0, k=4, **given).items():
            for got, want in zip(outputs, whole[name], strict=True):
                if got.is_floating_point():
                    assert torch.equal(got == -INF, want == -INF)
                    # A bfloat16 is a whole unit away where float32 is near half of one.
                    near = 1e-2 if got.dtype == BF16 else 1e-5
                    torch.testing.assert_close(got, want, rtol=near, atol=1e-5)
                else:
                    assert torch.equal(got, want), name


@pytest.mark.usefixtures("running")
def test_a_strided_target_is_read_right():
    z, b = logits(2, 136, DEVICE)
    targets = torch.arange(4, device=DEVICE)[::2]
    out, want = torch.empty(2, device=DEVICE), torch.empty(2, device=DEVICE)
    launch.score(z, b, packed.mask(2.0), targets, out)
    launch.score(z, b, packed.mask(2.0), targets.contiguous(), want)
    assert same(out, want)


@pytest.mark.usefixtures("running")
def test_a_target_outside_the_vocabulary_reads_nothing():
    z, b = logits(2, 100, DEVICE)
    target = torch.tensor([-1, 100], device=DEVICE)
    out = [torch.zeros(2, device=DEVICE) for _ in range(4)]
    inside = torch.ones(2, dtype=torch.bool, device=DEVICE)
    launch.score(z, b, packed.mask(1.0), target, out[0])
    launch.project_strength(z, b, target, 0.1, "projected", *out[1:], inside)
    assert out[0].isnan().all() and not inside.any()


@triton.jit
def _noise(seed, position, bits, given, out, n: tl.constexpr, RUN: tl.constexpr):
    token = tl.arange(0, n)
    word = random_bits(tl.load(seed), token, tl.load(position), RUN)
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
        token = torch.arange(n)
        philox = reference.philox(seed.cpu().expand(n), token, position.cpu().expand(n))
        for run in (1, 4, n):
            _noise[(1,)](seed, position, bits.zero_(), given.to(DEVICE), out, n, run)
            assert bits.tolist() == philox.tolist()
        torch.testing.assert_close(out.cpu().double(), want, rtol=2e-7, atol=3e-7)


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="counts the interpreter's loads")
@pytest.mark.usefixtures("running")
def test_elements_read(monkeypatch):
    """One read of a row, and then the cells or tiles with support; off it sums of tiles suffice."""
    tile = launch.TILE
    vocab = 20 * tile + 5
    z, b = logits(1, vocab, DEVICE, spread=0.1)
    b = b.clone()
    z[0, [3, 40, 700]] = 20.0  # of tiles 0 and 10
    rows = [range(x.data_ptr(), x.data_ptr() + 4 * vocab) for x in (z, b)]
    builder = triton.runtime.interpreter.InterpreterBuilder
    original = builder.create_masked_load
    read = [0, 0]

    def count(self, pointers, mask, *rest):
        for i, row in enumerate(rows):
            here = (pointers.data >= row.start) & (pointers.data < row.stop)
            read[i] += int((here & mask.data).sum())
        return original(self, pointers, mask, *rest)

    def reads(operator, **given):
        read[:] = 0, 0
        o = options(z, target=torch.tensor([9]), k=3, **given)
        OPERATORS[operator].run(z, b, o, "triton", None)
        assert read[0] == read[1]
        return read[0]

    monkeypatch.setattr(builder, "create_masked_load", count)
    near = vocab + 2 * tile
    assert reads("steer") == near
    # A tile of 64 has cells of one token each, and three are in reach of their tile's peak.
    assert reads("sample greedy") == reads("sample noisy") == vocab + 3
    assert reads("sample greedy", alpha=0.0) == reads("steer", penalty=-1.0) == 2 * vocab
    assert reads("divergence") == vocab
    assert reads("steering_vector") == 2 * vocab
    assert reads("score") == reads("project_strength") == vocab + 3 + 1
    assert reads("score", penalty=0.0) == near + 1
    assert reads("score", alpha=0.0) == 2 * vocab + 1
    assert reads("topk") == vocab + 3
    assert reads("support") == vocab + 3 + 1
    assert reads("sample cut") == vocab + 2 * 3
    # More cells than the list may have: the tiles that have them are read.
    monkeypatch.setattr(triton_blocks, "CAPACITY", tl.constexpr(2))
    assert reads("sample greedy") == near
    assert reads("score") == reads("project_strength") == reads("support") == near + 1
    # For each of 3 tokens that are picked, one of each tile with support.
    assert reads("topk") == near + 3 * 2


@pytest.mark.skipif(not INTERPRETED, reason="changes a constant of compiled kernels")
@pytest.mark.parametrize("vocab", [5 * 64 + 8, 5 * 64 + 3])
@pytest.mark.usefixtures("running")
def test_a_list_of_tiles_says_what_one_of_cells_does(vocab, monkeypatch):
    z, b = logits(2, vocab, DEVICE, BF16, spread=1.0)
    o = options(z, alpha=0.05)

    def found(name):
        return OPERATORS[name].run(z, b, o, "triton", None)

    names = "sample noisy", "sample cut", "score", "topk", "project_strength", "support"
    cells = [found(name) for name in names]
    monkeypatch.setattr(triton_blocks, "CAPACITY", tl.constexpr(2))
    for name, want in zip(names, cells, strict=True):
        torch.testing.assert_close(found(name), want)


@pytest.mark.skipif(not INTERPRETED, reason="changes a constant of compiled kernels")
@pytest.mark.parametrize("vocab", [20 * 64, 20 * 64 + 3])
@pytest.mark.usefixtures("running")
def test_cells_of_many_rounds_are_read_in_order(vocab, monkeypatch):
    """A cell is then all over its tile, as in tiles of the usual size."""
    monkeypatch.setattr(triton_measure, "CELLS", tl.constexpr(4))
    z = torch.zeros(2, vocab, device=DEVICE)
    z[:, 3::29], z[0, 64:128] = 3.0, 3.0  # the first row's need two blocks
    b = z - 1.0
    many = int((z == 3.0).sum(1).max())
    got = OPERATORS["support"].run(z, b, options(z, capacity=many), "triton", None)
    for i in range(2):
        want = (z[i] == 3.0).nonzero()[:, 0].tolist()
        assert got[0][i].tolist() == want + [-1] * (many - len(want))
        assert got[-1][i] == len(want)
        for top_k in (1, 2, len(want) // 2, len(want) - 1):
            draws = torch.arange(12, device=DEVICE)
            rows = z[i].expand(12, -1), b[i].expand(12, -1)
            drawn = ops.sample(
                *rows, 1.0, temperature=1.0, top_k=top_k, seed=draws, backend="triton"
            )
            assert set(drawn.token.tolist()) <= set(want[:top_k])
            assert max(drawn.token.tolist()) >= want[top_k // 2]
