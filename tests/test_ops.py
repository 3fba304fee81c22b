"""The public operators: backends agree, arguments are checked, torch can trace them."""

import math

import pytest
import torch

from svd_engine import ops
from svd_engine.kernels import reference
from svd_engine.ops import dispatch

RUNNING = [name for name, reason in ops.backends().items() if reason is None]


def rows(n=3, v=100, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = 4 * torch.randn(n, v, generator=generator)
    return z.to(dtype), (z + torch.randn(n, v, generator=generator)).to(dtype)


def test_the_cpu_backend_was_built():
    assert ops.backends()["cpu"] is None, ops.backends()["cpu"]


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backends_agree(backend, dtype):
    z, b = rows(dtype=dtype)
    truth = reference.steer(z.double(), b.double(), -3.0)
    got = ops.steer(z, b, -3.0, backend=backend)
    assert got.dtype == dtype
    # Half of the last place of the output's dtype, and float32's own rounding before it. Triton's
    # interpreter cuts off where a device rounds.
    rounding = torch.finfo(dtype).eps / (1 if backend == "triton" else 2)
    torch.testing.assert_close(got.double(), truth, atol=1e-5, rtol=1.01 * rounding)
    sampled = ops.sample(z, b, -3.0, backend=backend)
    assert torch.equal(sampled.token, reference.sample(z, b, -3.0).token)
    drawn = ops.sample(z, b, -3.0, temperature=1.5, seed=5, position=9, backend=backend)
    truth = reference.sample(z, b, -3.0, temperature=1.5, seed=5, position=9)
    assert torch.equal(drawn.token, truth.token)
    torch.testing.assert_close(drawn.logprob, truth.logprob, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", RUNNING)
def test_out_takes_any_dtype_and_stride(backend):
    z, b = rows(dtype=torch.bfloat16)
    buffer = torch.full((3, 128), math.nan)
    out = ops.steer(z, b, 2.0, out=buffer[:, :100], backend=backend)
    torch.testing.assert_close(out, ops.steer(z.float(), b.float(), 2.0, backend=backend))
    assert buffer[:, 100:].isnan().all()


def test_columns_may_be_strided_and_rows_empty():
    z, b = rows()
    torch.testing.assert_close(ops.steer(z.T.contiguous().T, b, 1.0), ops.steer(z, b, 1.0))
    empty = torch.empty(0, 100)
    assert ops.steer(empty, empty, 1.0).shape == (0, 100)
    assert ops.sample(empty, empty, 1.0).token.shape == (0,)


def test_a_seed_a_row_makes_rows_independent_of_the_batch():
    z, b = rows(n=4)
    seeds, positions = torch.arange(4), torch.tensor([3, 1, 4, 1])
    together = ops.sample(z, b, 1.0, alpha=0.0, temperature=2.0, seed=seeds, position=positions)
    for i in range(4):
        alone = ops.sample(
            z[i : i + 1], b[i : i + 1], 1.0, alpha=0.0, temperature=2.0, seed=i,
            position=int(positions[i]),
        )  # fmt: skip
        assert alone.token[0] == together.token[i]


def _elsewhere(z, b):
    """The Triton backend with a device that it does not take."""
    return dispatch.choose("steer", "triton", torch.device("meta"))


BAD = {
    "adapted must be a tensor": lambda z, b: ops.steer([1.0], b, 1.0),
    "adapted must have shape": lambda z, b: ops.steer(z[0], b, 1.0),
    "base must be one of": lambda z, b: ops.steer(z, b.long(), 1.0),
    "must have one shape": lambda z, b: ops.steer(z, b[:, :50], 1.0),
    "float64": lambda z, b: ops.steer(z.double(), b.double(), 1.0),
    "strength must be finite": lambda z, b: ops.steer(z, b, math.nan),
    "strength must be a number or have shape": lambda z, b: ops.steer(z, b, torch.ones(2)),
    "strength must be finite; got": lambda z, b: ops.steer(z, b, torch.tensor([1.0, math.nan, 1])),
    "alpha must lie": lambda z, b: ops.steer(z, b, 1.0, alpha=1.5),
    "alpha must lie in": lambda z, b: ops.steer(z, b, 1.0, alpha=math.nan),
    "penalty must be": lambda z, b: ops.steer(z, b, 1.0, penalty=1.0),
    "out must be": lambda z, b: ops.steer(z, b, 1.0, out=torch.empty(3, 99)),
    "out must have strides": lambda z, b: ops.steer(z, b, 1.0, out=torch.empty(100, 3).T),
    "temperature must be": lambda z, b: ops.sample(z, b, 1.0, temperature=-1.0),
    "top_k must be": lambda z, b: ops.sample(z, b, 1.0, top_k=-1),
    "top_p must lie": lambda z, b: ops.sample(z, b, 1.0, top_p=0.0),
    "min_p must lie": lambda z, b: ops.sample(z, b, 1.0, min_p=2.0),
    "seed must be an integer": lambda z, b: ops.sample(z, b, 1.0, seed=torch.ones(3)),
    "k must lie": lambda z, b: ops.topk(z, b, 1.0, 101),
    "target must be int64": lambda z, b: ops.score(z, b, 1.0, torch.zeros(3)),
    "target must hold": lambda z, b: ops.score(z, b, 1.0, torch.tensor([0, 100, 0])),
    "backend must be one of": lambda z, b: ops.steer(z, b, 1.0, backend="gpu"),
    "seed must be an integer of 64": lambda z, b: ops.sample(z, b, 1.0, seed=2**63),
    "has no steer for meta": lambda z, b: _elsewhere(z, b),
}


@pytest.mark.parametrize("message", BAD)
def test_refusals(message):
    with pytest.raises(ValueError, match=message):
        BAD[message](*rows())


def test_an_explicit_backend_that_cannot_run_raises(monkeypatch):
    monkeypatch.setattr(dispatch, "unavailable", lambda name: "not today")
    dispatch.choose.cache_clear()
    try:
        z, b = rows()
        with pytest.raises(ValueError, match="cannot run here: not today"):
            ops.steer(z, b, 1.0, backend="cpu")
        assert ops.steer(z, b, 1.0).shape == z.shape  # auto falls back
    finally:
        dispatch.choose.cache_clear()


def every_operator(z, b):
    target = ops.sample(z, b, -1.0, temperature=1.0, top_k=5, seed=torch.arange(3)).token
    return (
        ops.steering_vector(z, b), ops.steer(z, b, 2.0), target, *ops.topk(z, b, 1.0, 3),
        *ops.project_strength(z, b, target), ops.score(z, b, 1.0, target), ops.divergence(z, b),
    )  # fmt: skip


def test_one_graph_holds_every_operator():
    z, b = rows()
    compiled = torch.compile(every_operator, fullgraph=True, backend="aot_eager")
    for got, truth in zip(compiled(z, b), every_operator(z, b), strict=True):
        torch.testing.assert_close(got, truth)


def test_opcheck():
    z, b = rows()
    t, registered = torch.tensor([1, 2, 3]), torch.ops.svd_engine
    mask = (0.1, -math.inf)
    draw = (0, t, 0, None)
    calls = {
        registered.steering_vector: (z, b),
        registered.steer: (z, b, 1.0, None, *mask, torch.bfloat16),
        registered.sample: (z, b, 0.0, torch.ones(3), *mask, 1.0, 0, 1.0, 0.0, *draw),
        registered.sample_cut: (z, b, 1.0, None, *mask, 1.0, 5, 0.9, 0.01, *draw),
        registered.topk: (z, b, 1.0, None, *mask, 2),
        registered.project_strength: (z, b, t, 0.1),
        registered.score: (z, b, 1.0, None, 0.1, 0.0, t),
        registered.divergence: (z, b),
    }
    assert {op.__name__ for op in calls} == {*dispatch.OPERATORS, "sample_cut"}
    for operator, arguments in calls.items():
        torch.library.opcheck(operator.default, (*arguments, "auto"))
