"""The few-rows linear against float64, and against PyTorch's own linear where that serves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from svd_engine.model.layers import linear
from svd_engine.ops import cpu

F32, BF16 = torch.float32, torch.bfloat16
INF, NAN = float("inf"), float("nan")
needs_library = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


@pytest.fixture(autouse=True)
def one_thread_and_no_grad():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=cpu.CAPABILITIES)
def each_capability(request):
    best = cpu.capability()
    if cpu.capability(request.param) != request.param:
        pytest.skip(f"no {request.param} here")
    yield
    cpu.capability(best)


def case(rows, fan_in, out, rank=0, dtype=F32, low_dtype=F32, seed=0):
    """x, weight, bias and a low-rank term (None for rank 0)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    low = normal(rank, fan_in), normal(out, rank), normal(out)
    return (
        normal(rows, fan_in).to(dtype),
        normal(out, fan_in).to(dtype),
        normal(out).to(dtype),
        tuple(part.to(low_dtype) for part in low) if rank else None,
    )


def run(x, weight, bias=None, low_rank=None, first=0):
    """The kernel itself, into NaN."""
    out = torch.full((*x.shape[:-1], weight.shape[0]), NAN, dtype=x.dtype)
    cpu.linear(x, weight, bias, *(low_rank or (None, None, None)), first, out)
    return out


def composed(x, weight, bias=None, low_rank=None, first=0, dtype=torch.float64):
    """The definition; and with `dtype` float32, what it costs in accuracy to round every term."""
    x, weight = x.to(dtype), weight.to(dtype)
    out = x @ weight.T
    size = x.abs() @ weight.abs().T
    if bias is not None:
        out, size = out + bias.to(dtype), size + bias.abs().to(dtype)
    if low_rank is not None:
        down, up, up_bias = (None if part is None else part.to(dtype) for part in low_rank)
        rows = x[first:]
        out[first:] += rows @ down.T @ up.T
        size[first:] += rows.abs() @ down.abs().T @ up.abs().T
        if up_bias is not None:
            out[first:] += up_bias
            size[first:] += up_bias.abs()
    return out, size


def check(x, weight, bias=None, low_rank=None, first=0):
    """As near to the truth as PyTorch comes in the same dtype, or nearer."""
    got = run(x, weight, bias, low_rank, first).double()
    truth, size = composed(x, weight, bias, low_rank, first)
    plain = linear._composed(x, weight, bias, low_rank, first).double()
    floor = 2**-9 * truth.abs() * (x.dtype == BF16) + 3e-7 * size  # one rounding of the result
    assert not got.isnan().any()
    assert ((got - truth).abs() <= (plain - truth).abs() + floor).all()


@needs_library
@pytest.mark.usefixtures("each_capability")
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [*range(1, 22), 259])
def test_every_number_of_rows(rows, dtype):
    for fan_in, out in ((64, 12), (577, 33)):
        for first in (0, rows // 2, rows):
            check(*case(rows, fan_in, out, 8, dtype), first)
        check(*case(rows, fan_in, out, 0, dtype))


@needs_library
@pytest.mark.usefixtures("each_capability")
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9) | st.integers(17, 22),
    fan_in=st.integers(0, 140),
    out=st.integers(0, 21),
    rank=st.integers(0, 40),
    dtypes=st.sampled_from([(F32, F32), (BF16, BF16), (BF16, F32), (F32, BF16)]),
    pad=st.integers(0, 5),
    step=st.integers(1, 2),
    data=st.data(),
)
def test_sizes_and_strides(rows, fan_in, out, rank, dtypes, pad, step, data):
    x, weight, bias, low_rank = case(rows * step, fan_in, out, rank, *dtypes)
    first = data.draw(st.integers(0, rows))
    want = run(x[::step].clone(), weight, bias, low_rank, first)
    wide_x = torch.full((rows * step, fan_in + pad), NAN, dtype=x.dtype)
    wide_x[:, pad:] = x
    wide_weight = torch.full((out, fan_in + pad), NAN, dtype=x.dtype)
    wide_weight[:, pad:] = weight
    x, weight = wide_x[::step, pad:], wide_weight[:, pad:]
    assert torch.equal(run(x, weight, bias, low_rank, first), want)
    check(x, weight, bias, low_rank, first)
    check(x, weight, None, low_rank and (*low_rank[:2], None), first)


@needs_library
@pytest.mark.usefixtures("each_capability")
def test_other_layouts():
    x, weight, bias, low_rank = case(6, 100, 30, 4)
    want = run(x, weight, bias, low_rank, 3)
    for shape in ((2, 3, 100), (6, 1, 100), (1, 6, 100)):
        shaped = run(x.view(shape), weight, bias, low_rank, 3)
        assert torch.equal(shaped, want.view(*shape[:-1], 30))
    last = torch.stack([torch.full_like(x, NAN), x], 1)[:, 1:]  # of every sequence
    assert torch.equal(run(last, weight, bias, low_rank, 3), want[:, None])
    swapped = x.view(2, 3, 100).transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(run(swapped, weight, bias, low_rank, 3), want.view(2, 3, 30))
    assert torch.equal(run(x.T.contiguous().T, weight, bias, low_rank, 3), want)
    assert torch.equal(run(x[0], weight, bias), want[0])
    storage = torch.zeros(4 * 30 * 100 + 1, dtype=torch.uint8)
    unaligned = torch.frombuffer(storage.numpy(), dtype=F32, count=3000, offset=1).view(30, 100)
    unaligned.copy_(weight)
    assert torch.equal(run(x, unaligned, bias, low_rank, 3), want)
    twice = bias.repeat_interleave(2)[::2]
    assert torch.equal(run(x, weight, twice, low_rank, 3), want)
    expanded = weight[:1].expand(30, -1)
    assert torch.equal(run(x, expanded), run(x, expanded.clone()))


@needs_library
@pytest.mark.usefixtures("each_capability")
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("fan_in", [96, 101])
def test_what_is_not_finite_stays_in_its_row_and_column(dtype, fan_in):
    x, weight, bias, low_rank = case(8, fan_in, 10, 4, dtype)
    clean = run(x, weight, bias, low_rank, 4)
    x[1, -1], x[6, 0] = NAN, INF
    weight[3, -1], weight[9, 5] = INF, NAN
    got = run(x, weight, bias, low_rank, 4)
    assert got[1].isnan().all() and not got[6].isfinite().any()
    assert got[:, 9].isnan().all() and not got[:, 3].isfinite().any()
    rows, columns = [0, 2, 3, 4, 5, 7], [0, 1, 2, 4, 5, 6, 7, 8]
    assert torch.equal(got[rows][:, columns], clean[rows][:, columns])
    low_rank[1][2] = NAN  # of the adapter: the base rows do not see it
    got = run(x, weight, bias, low_rank, 4)
    assert got[4:, 2].isnan().all()
    assert torch.equal(got[[0, 2, 3], 2], clean[[0, 2, 3], 2])


@needs_library
@pytest.mark.usefixtures("each_capability")
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_same_bits_for_any_number_of_rows_and_threads(dtype):
    """Of few rows or of many, which are multiplied in another way."""
    few = 2 if dtype == BF16 and cpu.capability() == "AVX2" else 16
    for numbers in (range(1, few + 1), (*range(few + 1, 20), 41, 300)):
        x, weight, bias, low_rank = case(numbers[-1], 576, 1001, 16, dtype)
        adapted, base = run(x, weight, bias, low_rank), run(x, weight, bias)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for rows in numbers:
                for first in {0, rows // 2, rows}:
                    got = run(x[:rows], weight, bias, low_rank, first)
                    assert torch.equal(got[:first], base[:first])
                    assert torch.equal(got[first:], adapted[first:rows])


@needs_library
def test_offsets_are_64_bit():
    """Weight rows 2**31 + 64 elements apart; only the pages of two rows are used."""
    stride = 2**31 + 64
    try:
        storage = torch.empty(stride + 100, dtype=BF16)
    except RuntimeError as error:
        pytest.skip(str(error))
    x, weight, *_ = case(2, 100, 2, 0, BF16)
    far = storage.as_strided((2, 100), (stride, 1))
    far.copy_(weight)
    assert torch.equal(run(x, far), run(x, weight))


@needs_library
def test_wrong_arguments_raise():
    x, weight, bias, low_rank = case(2, 10, 6, 4)
    down, up, _ = low_rank
    for arguments in (
        (x[:, :9], weight),
        (x.double(), weight.double()),
        (x.to(BF16), weight),
        (x, weight[0]),
        (x, weight.T.contiguous().T),
        (x, weight, bias[:5]),
        (x, weight, bias, (down, None, None)),
        (x, weight, bias, (down[:3], up, None)),
        (x, weight, bias, (down, up[:5], None)),
        (x, weight, bias, (down, up, bias[:5])),
        (x, weight, bias, low_rank, -1),
    ):
        with pytest.raises(RuntimeError):
            run(*arguments)
    with pytest.raises(RuntimeError):
        cpu.linear(x, weight, None, None, None, None, 0, torch.empty(2, 5))


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [1, 4, 16, 17, 40])
def test_linear_is_that_of_pytorch_with_the_low_rank_term(dtype, rows):
    x, weight, bias, low_rank = case(rows, 48, 20, 4, dtype, F32 if dtype == BF16 else dtype)
    for first in (0, rows // 2):
        for shape in ((rows, 48), (rows, 1, 48), (1, rows, 48)):
            got = linear.linear(x.view(shape), weight, bias, low_rank, first)
            want = composed(x, weight, bias, low_rank, first)[0].view(*shape[:-1], 20)
            assert got.dtype == dtype
            rounding = torch.finfo(dtype).eps * 48
            torch.testing.assert_close(got.double(), want, rtol=rounding, atol=rounding)
    across = weight.T.contiguous().T
    want = nn.functional.linear(x, across, bias)
    assert torch.equal(linear.linear(x, across, bias), want)


@needs_library
def test_linear_takes_the_kernel_for_few_rows(monkeypatch):
    calls = []
    monkeypatch.setattr(
        cpu,
        "linear",
        lambda *arguments: calls.append(arguments[0].shape) or arguments[-1].zero_(),
    )
    monkeypatch.setattr(linear, "most_rows", {F32: 16}.get)
    x, weight, bias, low_rank = case(17, 48, 20, 4)
    linear.linear(x, weight)  # too many
    linear.linear(x.half(), weight.half())
    linear.linear(x[:2], weight.T.contiguous().T)
    with torch.inference_mode(False), torch.enable_grad():
        linear.linear(x[:2].clone(), weight.clone())
    assert calls == []
    linear.linear(x[:-1], nn.Parameter(weight), bias, low_rank, 8)
    linear.linear(x[0], weight)
    assert calls == [(16, 48), (48,)]


def test_gradients_flow():
    with torch.inference_mode(False), torch.enable_grad():
        x, weight, bias, low_rank = case(2, 12, 6, 3)
        leaves = [part.clone().requires_grad_() for part in (x, weight, bias, *low_rank)]
        linear.linear(*leaves[:3], tuple(leaves[3:]), 1).sum().backward()
        assert all(leaf.grad is not None for leaf in leaves)


def test_traces():
    x, weight, bias, low_rank = case(2, 12, 6, 3)
    traced = torch.compile(linear.linear, backend="eager", fullgraph=True)
    want = composed(x, weight, bias, low_rank, 1)[0].float()
    torch.testing.assert_close(traced(x, weight, bias, low_rank, 1), want)


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, linear.FEW, 37])
def test_bfloat16_goes_through_float32_where_that_is_faster(
    rows, with_bias, capability, monkeypatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(linear, "PIECE", 64 * 20)  # 20, 20 and 8 outputs
    x, weight, bias, _ = case(rows, 64, 48, dtype=BF16)
    bias = bias if with_bias else None
    multiplied, plain = [], nn.functional.linear

    def seen(x, *rest):
        multiplied.append(x.dtype)
        return plain(x, *rest)

    monkeypatch.setattr(nn.functional, "linear", seen)
    got = linear.product(x, weight, bias)
    assert multiplied == ([F32] * 3 if capability == "AVX2" and rows > 1 else [BF16])
    want = x.double() @ weight.double().T
    want += 0.0 if bias is None else bias.double()
    assert got.dtype == BF16
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-3)
    with torch.inference_mode(False), torch.enable_grad():
        assert not linear.is_slow(x)
