"""The few-rows linear in Triton against float64: interpreted, or on a GPU if there is one."""

import math
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from svd_engine.kernels import launch, launch_linear, reference

from .cases import BF16, NAN
from .cases import F16 as HALF
from .cases import F32 as FLOAT
from .oracle import POISON
from .runners import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
ULP = 2.0**-22 if INTERPRETED else 2.0**-20  # a GPU's exp is good to a few float32 roundings
pytestmark = [
    pytest.mark.slow,
    pytest.mark.slow,
    pytest.mark.skipif(launch.unavailable() is not None, reason=str(launch.unavailable())),
    # numpy, which the interpreter computes with, remarks on every -inf - -inf.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

NONE = (None, None, None)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Every kind of tile at small sizes, and NaN in memory that is yet to be written."""
    monkeypatch.setattr(launch_linear, "TILES", ((96, 32, 5), (64, 16, 9), (0, 16, 9)))
    monkeypatch.setattr(launch_linear, "PROGRAMS", 9)
    monkeypatch.setattr(launch_linear, "COLUMNS", 48)
    monkeypatch.setattr(launch_linear, "IN_BYTES", 64)
    monkeypatch.setattr(launch_linear, "SUM_TILE", 32)
    monkeypatch.setattr(torch, "empty", lambda *shape, **kind: torch.full(shape, NAN, **kind))


class Layer(NamedTuple):
    weight: Any
    bias: Any = None
    low_rank: Any = None
    output_scale: Any = None


def joined(weight, bias, down, up, up_bias):
    low_rank = None if down is None else (down, up, up_bias)
    return launch_linear.join([Layer(weight, bias, low_rank)])


def case(rows, fan_in, out, rank=0, dtype=BF16, low_dtype=None, seed=0):
    """x, weight, bias, and down, up, up_bias (None for rank 0)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(kind, *shape):
        return torch.randn(*shape, generator=generator).to(kind).to(DEVICE)

    low = [normal(low_dtype or dtype, *shape) for shape in ((rank, fan_in), (out, rank), (out,))]
    whole = [normal(dtype, *shape) for shape in ((rows, fan_in), (out, fan_in), (out,))]
    return *whole, *(low if rank else NONE)


def run(x, weight, bias, down, up, up_bias, first=0, lead=0):
    """The kernel's answer, written between columns that it must leave alone."""
    out = len(weight)
    buffer = torch.full((len(x), lead + out + 8), POISON, dtype=x.dtype, device=DEVICE)
    before = buffer.clone()
    here = buffer[:, lead : lead + out]
    launch_linear.linear(x, joined(weight, bias, down, up, up_bias), first, here)
    assert torch.equal(buffer[:, :lead], before[:, :lead])
    assert torch.equal(buffer[:, lead + out :], before[:, lead + out :])
    return here


def exact(*tensors, first=0):
    """The definition in float64, and the sum of the terms' absolute values."""
    wide = [None if x is None else x.double() for x in tensors]
    size = [None if x is None else x.abs() for x in wide]
    return reference.linear(*wide, first), reference.linear(*size, first)


def check(*tensors, first=0, **options):
    """Float32 sums, rounded once to the dtype of x."""
    got = run(*tensors, first, **options)
    truth, size = exact(*tensors, first=first)
    unit = torch.finfo(got.dtype).eps
    if not (INTERPRETED and got.dtype == BF16):  # the interpreter truncates to bfloat16
        unit /= 2
    assert got.isfinite().all()
    assert ((got.double() - truth).abs() <= unit * truth.abs() + ULP * size).all()
    return got


def dot_in_order(self, a, b, total, *_):
    """a b + total as tensor cores do it: every element in the same way."""
    sums = total.data.copy()
    for k in range(a.data.shape[1]):
        sums += a.data[:, k, None] * b.data[k]
    return type(total)(sums, total.dtype)


def test_the_reference_is_torch_s_linear():
    x, weight, bias, down, up, up_bias = case(4, 30, 20, 3, torch.float64, torch.float64)
    linear = torch.nn.functional.linear
    want = linear(x, weight, bias)
    torch.testing.assert_close(reference.linear(x, weight, bias), want)
    want[1:] += linear(linear(x[1:], down), up, up_bias)
    torch.testing.assert_close(reference.linear(x, weight, bias, down, up, up_bias, 1), want)


@pytest.mark.parametrize("out", [1, 33, 64, 79, 131])  # columns in up to 3 parts, 2, whole
@pytest.mark.parametrize(("rows", "fan_in"), [(1, 1), (2, 31), (3, 100), (16, 136)])
def test_any_size(rows, fan_in, out):
    check(*case(rows, fan_in, out))
    check(*case(rows, fan_in, out, 3), first=rows // 2)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 16), fan_in=st.integers(1, 150), out=st.integers(1, 140),
    rank=st.integers(0, 20), first=st.integers(0, 16), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_size_drawn(rows, fan_in, out, rank, first, seed):
    check(*case(rows, fan_in, out, rank, BF16, seed=seed), first=min(first, rows))


@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF])
def test_any_dtype(dtype):
    for out in (40, 100):
        check(*case(3, 100, out, 9, dtype), first=1)
        check(*case(3, 100, out, 0, dtype))


def test_an_adapter_is_rounded_once_to_the_weight_s_dtype():
    x, weight, bias, *low = case(3, 100, 40, 9, BF16, FLOAT)
    got = run(x, weight, bias, *low, 1)
    rounded = [tensor.to(BF16) for tensor in low[:2]]
    assert torch.equal(got, run(x, weight, bias, *rounded, low[2], 1))


@pytest.mark.parametrize("out", [40, 100])
def test_any_biases(out):
    x, weight, bias, down, up, up_bias = case(3, 64, out, 4)
    check(x, weight, None, *NONE)
    check(x, weight, None, down, up, None)
    check(x, weight, bias, down, up, None, first=2)
    check(x, weight, None, down, up, up_bias, first=2)
    every_other = torch.zeros(2 * out, dtype=BF16, device=DEVICE)[::2]
    every_other.copy_(bias)
    got = run(x, weight, every_other, *NONE)
    assert torch.equal(got, run(x, weight, bias, *NONE))


def test_the_tiles_of_large_weights(monkeypatch):
    monkeypatch.undo()
    check(*case(2, 260, 1030, 8), first=1)
    check(*case(2, 3100, 20, 8), first=1)


def test_strides_and_alignment():
    for out in (48, 100):
        x, weight, bias, down, up, up_bias = case(3, 72, out, 5)
        expected = run(x, weight, bias, down, up, up_bias, 1)
        for lead in (0, 1, 8):

            def padded(matrix, lead=lead):
                wide = matrix.new_full((len(matrix), matrix.shape[1] + 19), NAN)
                view = wide[:, lead : lead + matrix.shape[1]]
                return view.copy_(matrix)

            views = padded(x), padded(weight), bias, padded(down), padded(up), up_bias
            assert torch.equal(run(*views, 1, lead=lead), expected)
        one = x[:1].expand(3, -1)
        assert torch.equal(run(one, weight, bias, *NONE)[2], run(one[:1], weight, bias, *NONE)[0])


def test_offsets_beyond_31_bits(monkeypatch):
    monkeypatch.undo()
    if INTERPRETED:  # its copy back of the arguments would touch every byte of the storage
        executor = triton.runtime.interpreter.GridExecutor
        monkeypatch.setattr(executor, "_restore_args_dev", lambda *_: None)
    stride = 2**30 + 16
    tensors = case(3, 40, 3, 3)
    expected = run(*tensors, 1)
    for i in (0, 1):  # the matrices that are read where they lie
        matrix = tensors[i]
        room = 2 * stride + matrix.shape[1]  # hardly any of it touched
        far = torch.empty(room, dtype=matrix.dtype, device=DEVICE)
        far = far.as_strided(matrix.shape, (stride, 1)).copy_(matrix)
        assert torch.equal(run(*tensors[:i], far, *tensors[i + 1 :], 1), expected)
    far = torch.empty(2 * stride + 3, dtype=BF16, device=DEVICE).as_strided((3, 3), (stride, 1))
    launch_linear.linear(tensors[0], joined(*tensors[1:]), 1, far)
    assert torch.equal(far, expected)


def test_nothing_to_do():
    for rows, out in ((0, 100), (2, 0)):
        assert run(*case(rows, 8, out)).shape == (rows, out)
    for out in (5, 100):
        x, weight, bias, *_ = case(2, 0, out)
        assert torch.equal(run(x, weight, bias, *NONE), bias.expand(2, -1))
        x, weight, bias, *low = case(2, 10, out, 3)
        assert torch.equal(run(x, weight, bias, *low, 2), run(x, weight, bias, *NONE))


def test_joined_layers():
    """Three layers of one input, each with a rank and a scale of its own or none."""
    x, first, bias, *low = case(5, 100, 40, 3)
    second, third = case(5, 100, 24, seed=1)[1], case(5, 100, 33, seed=2)[1]
    down, up, _ = case(5, 100, 33, 6, seed=3)[3:]
    scale = torch.rand(24, device=DEVICE) + 0.5
    layers = Layer(first, bias, tuple(low)), Layer(second, None, None, scale)
    joint = launch_linear.join([*layers, Layer(third, None, (down, up, None))])
    parts = torch.full((launch_linear.parts_size(joint, 5),), NAN, device=DEVICE)
    splits = launch_linear.multiply(x, joint, parts)
    sums = parts.view(splits, 5, -1).sum(0).double()
    want = [reference.linear(x.double(), w.double()) for w in (first, second, third)]
    want += [reference.linear(x.double(), joint.down.double())]
    torch.testing.assert_close(sums, torch.cat(want, 1), atol=1e-4, rtol=1e-4)
    assert joint.rank == 8 and joint.weights[0] is first
    assert torch.equal(joint.scale[40:64], scale)


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize("out", [40, 70, 100])
def test_a_row_has_the_same_bits_in_any_batch(out, dtype, monkeypatch):
    if INTERPRETED:  # numpy adds the products of one row in another order than those of the next
        builder = triton.runtime.interpreter.InterpreterBuilder
        monkeypatch.setattr(builder, "create_dot", dot_in_order)
    x, *others = case(16, 150, out, 5, dtype)
    monkeypatch.setattr(launch_linear, "MANY_ROWS", 32)
    together = run(x, *others, 7)
    many = run(torch.cat([x, x, x]), *others, 7)
    assert torch.equal(many[:7], together[:7]) and torch.equal(many[39:], together[7:])
    for row in (0, 5, 7, 15):
        for last in {row + 1, min(row + 4, 16)}:
            some = run(x[row:last], *others, max(0, 7 - row))
            assert torch.equal(some, together[row:last])
    alone = run(x, *others[:2], *NONE)
    assert torch.equal(alone[:7], together[:7]), "the adapter touched rows before `first`"


@pytest.mark.parametrize("value", [NAN, math.inf])
@pytest.mark.parametrize("out", [40, 100])
def test_bad_rows_are_isolated(value, out):
    x, *others = case(6, 70, out, 3)
    clean = run(x, *others, 3)
    x[1, 0] = x[4, 69] = value
    got = run(x, *others, 3)
    assert not got[[1, 4]].isfinite().any()
    assert torch.equal(got[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])


def test_a_bad_adapter_spoils_its_rows_alone():
    x, weight, bias, down, up, up_bias = case(4, 70, 100, 3)
    clean = run(x, weight, bias, *NONE)
    down[1, 5] = NAN
    got = run(x, weight, bias, down, up, up_bias, 2)
    assert torch.equal(got[:2], clean[:2])
    assert got[2:].isnan().all()


@pytest.mark.skipif(not INTERPRETED, reason="counts the interpreter's loads")
@pytest.mark.parametrize("out", [40, 70, 131])
def test_elements_read(out, monkeypatch):
    """The weight and `down` are read once, whatever the rows."""
    builder = triton.runtime.interpreter.InterpreterBuilder
    original = builder.create_masked_load
    x, *rest = case(16, 131, out, 3)
    joint = joined(*rest)
    weight, down, up = joint.weights[0], joint.down, joint.up
    spans = {
        name: range(m.data_ptr(), m.data_ptr() + m.nbytes)
        for name, m in {"weight": weight, "down": down, "up": up}.items()
    }
    read = dict.fromkeys(spans, 0)

    def count(self, pointers, mask, *rest):
        for name, span in spans.items():
            here = (pointers.data >= span.start) & (pointers.data < span.stop)
            read[name] += int((here & mask.data).sum())
        return original(self, pointers, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", count)
    for rows, first in ((1, 0), (2, 1), (16, 8)):
        read.update(dict.fromkeys(read, 0))
        result = torch.zeros(rows, out, dtype=x.dtype)
        launch_linear.linear(x[:rows], joint, first, result)
        adapted = rows - first
        assert read == {
            "weight": weight.numel(), "down": down.numel(), "up": adapted * up.numel()
        }  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_replay_it(monkeypatch):
    monkeypatch.undo()
    x, *others = case(2, 1536, 1024, 8)
    out = torch.zeros(2, 1024, dtype=BF16, device=DEVICE)
    joint = joined(*others)
    launch_linear.linear(x, joint, 1, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch_linear.linear(x, joint, 1, out)
    x.copy_(x.flip(-1))
    graph.replay()
    assert torch.equal(out, run(x, *others, 1))
