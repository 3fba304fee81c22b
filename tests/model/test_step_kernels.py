"""Each kernel of a decode step alone, interpreted, against float64."""

from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl

from svd_engine.kernels import launch, launch_linear, launch_step, triton_step_attend
from svd_engine.kernels.launch_step import Heads, Norm, Parts, Places
from tests.ops.runners import INTERPRETED

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason=str(launch.unavailable())),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
F32, F64 = torch.float32, torch.float64
ROWS, FIRST_ADAPTED = 3, 1
NAN = float("nan")


class Layer(NamedTuple):
    weight: Any
    bias: Any
    low_rank: Any
    output_scale: Any


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few programs, several of everything."""
    torch.manual_seed(0)
    for module in (triton_step_attend, launch_step):
        monkeypatch.setattr(module, "SPLITS", tl.constexpr(4))
    monkeypatch.setattr(launch_step, "BLOCK_BYTES", 1)
    monkeypatch.setattr(launch_step, "GATE_TILE", 16)


def product(outs, rank, splits=2, scaled=False, fan_in=8):
    """Parts as `linear_tiles` leaves them, and what they make, in float64 `[ROWS, outputs]`."""
    x = torch.randn(ROWS, fan_in)
    layers, wanted = [], []
    for i, out in enumerate(outs):
        weight, bias = torch.randn(out, fan_in), torch.randn(out)
        scale = torch.rand(out) if scaled else None
        low_rank = None
        if rank:  # of the layers after the first it is less, and padded
            own = max(1, rank - i)
            low_rank = torch.randn(own, fan_in), torch.randn(out, own), torch.randn(out)
        layers.append(Layer(weight, bias, low_rank, scale))
        base = x.double() @ weight.double().T + bias
        adapted = base * (1 if scale is None else scale.double())
        if low_rank is not None:
            down, up, up_bias = (t.double() for t in low_rank)
            adapted = adapted + x.double() @ down.T @ up.T + up_bias
        wanted.append(torch.cat([base[:FIRST_ADAPTED], adapted[FIRST_ADAPTED:]]))
    joined = launch_linear.join(layers)
    every = torch.cat([*joined.weights, joined.down])
    half = fan_in // splits
    parts = [x[:, i * half :][:, :half] @ every[:, i * half :][:, :half].T for i in range(splits)]
    return Parts(torch.stack(parts).flatten(), joined, splits), torch.cat(wanted, 1)


def norm_of(size, offset=0.0):
    return Norm(torch.randn(size), 1e-5, offset)


def normalised(x, norm):
    scale = (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    return x * scale * (norm.weight.double() + norm.offset)


def close(got, want):
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("width", [24, 21], ids=["by 16 bytes", "one by one"])
@pytest.mark.parametrize("rank", [0, 3, 20, 32])
@pytest.mark.parametrize("has_after", [False, True])
def test_finish_norm(width, rank, has_after):
    parts, y = product([width], rank, scaled=rank == 3)
    after, before = norm_of(width) if has_after else None, norm_of(width, offset=1.0)
    residual = torch.randn(ROWS, width)
    stream, normal = torch.full_like(residual, NAN), torch.full_like(residual, NAN)
    launch_step.finish_with_norm(parts, after, residual, 0.5, before, FIRST_ADAPTED, stream, normal)
    want = residual + 0.5 * (y if after is None else normalised(y, after))
    close(stream, want)
    close(normal, normalised(want, before))


def test_norm_without_a_product():
    residual, before = torch.randn(ROWS, 24), norm_of(24)
    stream, normal = torch.full_like(residual, NAN), torch.full_like(residual, NAN)
    launch_step.finish_with_norm(None, None, residual, 1.0, before, 0, stream, normal)
    assert torch.equal(stream, residual)
    close(normal, normalised(residual.double(), before))


@pytest.mark.parametrize("is_gelu", [False, True])
def test_finish_gate(is_gelu):
    size = 21
    parts, y = product([size, size], rank=4)
    input_scale, out = torch.rand(size), torch.full((ROWS, size), NAN)
    launch_step.finish_with_gate(parts, is_gelu, input_scale, FIRST_ADAPTED, out)
    gate, up = y.chunk(2, 1)
    functional = torch.nn.functional
    gate = functional.gelu(gate, approximate="tanh") if is_gelu else functional.silu(gate)
    want = gate * up
    want[FIRST_ADAPTED:] *= input_scale
    close(out, want)


@pytest.mark.parametrize("norm", ["none", "of each head", "across heads"])
@pytest.mark.parametrize("rotary_dim", [0, 4, 8])
def test_finish_heads(norm, rotary_dim):
    heads, kv_heads, dim, slots = 2, 1, 8, 6
    parts, y = product([heads * dim, kv_heads * dim, kv_heads * dim], rank=4)
    sizes = {"none": None, "of each head": (dim, dim)}.get(norm, (heads * dim, kv_heads * dim))
    norms = (None, None) if sizes is None else (norm_of(sizes[0]), norm_of(sizes[1], 1.0))
    form = Heads(heads, kv_heads, dim, 1.0, 0, 0.0, *norms)
    positions = torch.tensor([4, 0, slots])  # the last has no room
    places = Places(positions, 1, torch.tensor([slots]), FIRST_ADAPTED)
    tables = (torch.randn(slots, rotary_dim), torch.randn(slots, rotary_dim))
    query = torch.full((ROWS, heads, dim), NAN)
    keys, values = torch.full((2, ROWS, kv_heads, slots, dim), NAN)
    launch_step.finish_with_heads(
        parts, form, places, tables if rotary_dim else None, query, keys, values
    )
    q, k, v = y.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    wanted = []
    for x, each in ((q, norms[0]), (k, norms[1])):
        if each is not None:
            x = normalised(x if norm == "across heads" else x.view(ROWS, -1, dim), each)
        x = x.reshape(ROWS, -1, dim)
        if rotary_dim:
            cos, sin = (t[positions.clamp(max=slots - 1)].double()[:, None] for t in tables)
            part, rest = x[..., :rotary_dim], x[..., rotary_dim:]
            first, second = part.chunk(2, -1)
            x = torch.cat([part * cos + torch.cat([-second, first], -1) * sin, rest], -1)
        wanted.append(x)
    close(query, wanted[0])
    for stored, want in ((keys, wanted[1]), (values, v.view(ROWS, kv_heads, dim))):
        for row in range(2):
            close(stored[row, :, positions[row]], want[row])
        assert int((~stored.isnan()).sum()) == 2 * kv_heads * dim, "written elsewhere"


@pytest.mark.parametrize(("window", "softcap", "new"), [(0, 0.0, 1), (24, 0.0, 1), (0, 5.0, 2)])
def test_attend(window, softcap, new):
    heads, kv_heads, dim, slots = 4, 2, 8, 80
    positions = torch.tensor([70, 0, 33])
    form = Heads(heads, kv_heads, dim, 0.4, window, softcap, None, None)
    places = Places(positions, new, torch.tensor([slots]), FIRST_ADAPTED * new)
    query = torch.randn(ROWS * new, heads, dim)
    keys, values = torch.randn(2, ROWS, kv_heads, slots, dim)
    for row, position in enumerate(positions.tolist()):
        keys[row, :, position + new :] = values[row, :, position + new :] = NAN
    input_scale, out = torch.rand(heads * dim), torch.full_like(query, NAN)
    workspace = torch.full((launch_step.attention_size(ROWS * new, form),), NAN)
    launch_step.attend(query, keys, values, form, places, input_scale, workspace, out)
    for token in range(ROWS * new):
        row, end = token // new, int(positions[token // new]) + token % new + 1
        begin = max(0, end - window) if window else 0
        k, v = (
            x[row, :, begin:end].double().repeat_interleave(heads // kv_heads, 0)
            for x in (keys, values)
        )
        score = torch.einsum("hd,hsd->hs", query[token].double(), k) * form.scaling
        score = softcap * torch.tanh(score / softcap) if softcap else score
        want = torch.einsum("hs,hsd->hd", score.softmax(-1), v)
        if row >= FIRST_ADAPTED:
            want = want * input_scale.view(heads, dim)
        close(out[token], want)
