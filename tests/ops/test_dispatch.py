"""From a call to a backend, and the operators as torch sees them: traced, compiled, checked."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from svd_engine import ops
from svd_engine.kernels import reference
from svd_engine.ops import dispatch

from .cases import logits
from .runners import HERE


def rows(n=3):
    return logits(n, 100, "cpu")


def test_the_cpu_backend_was_built():
    assert ops.backends()["cpu"] is None, ops.backends()["cpu"]


def test_every_backend_that_runs_has_a_runner():
    running = {name for name, reason in ops.backends().items() if reason is None}
    assert running <= {runner.backend for runner in HERE}


def test_auto_is_the_fastest_that_runs():
    z, b = rows()
    want = ops.steer(z, b, -3.0, backend="cpu")
    assert torch.equal(ops.steer(z, b, -3.0), want)
    wide = ops.steer(z.double(), b.double(), -3.0, backend="reference")
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, reference.steer(z.double(), b.double(), -3.0))


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


def _targets(n):
    return torch.arange(n) % 50


HEAD = torch.randn(100, 16)
CALLS = {  # a call of each operator on n rows
    ops.steer: lambda z, b, n: (z, b, 1.0),
    ops.steering_vector: lambda z, b, n: (z, b),
    ops.sample: lambda z, b, n: (z, b, -1.0),
    ops.topk: lambda z, b, n: (z, b, 1.0, 3),
    ops.score: lambda z, b, n: (z, b, 1.0, _targets(n)),
    ops.project_strength: lambda z, b, n: (z, b, _targets(n)),
    ops.divergence: lambda z, b, n: (z, b),
    ops.linear_topk: lambda z, b, n: (z, b, HEAD, 1.0, 3),
    ops.linear_score: lambda z, b, n: (z, b, HEAD, torch.ones(n), _targets(n)),
    ops.linear_project_strength: lambda z, b, n: (z, b, HEAD, _targets(n)),
    ops.linear_divergence: lambda z, b, n: (z, b, HEAD),
}  # fmt: skip


@pytest.mark.parametrize("operator", CALLS, ids=lambda operator: operator.__name__)
def test_one_compilation_serves_every_batch_size(operator):
    """Dynamo gives up at the ninth."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(operator, fullgraph=True, dynamic=True, backend=counter)
    width = 16 if operator.__name__.startswith("linear") else 100
    counts = set()
    for n in range(2, 13):
        arguments = CALLS[operator](torch.randn(n, width), torch.randn(n, width), n)
        torch.testing.assert_close(compiled(*arguments), operator(*arguments))
        counts.add(counter.frame_count)
    assert len(counts) == 1


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
