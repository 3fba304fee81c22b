"""Measure the operators on the CPU beside what one would write otherwise.

    pytest benchmarks/kernels/test_operators.py --benchmark-json=runs/operators.json

Every case is checked against the reference before it is timed. Compare within one run: the
baselines are the paper's formula in eager PyTorch, `torch.compile` of the form in which the base
softmax cancels, reading both rows (their sums) and copying one. `extra_info` holds the bytes that
have to be read and written, and the rate at which the fastest round moved them.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.baselines import ALPHA, STRENGTH, compiled, eager, eager_difference
from benchmarks.records import machine
from svd_engine import ops
from svd_engine.kernels import reference
from svd_engine.kernels.arguments import Draw, Mask
from svd_engine.ops import cpu, dispatch

INF = math.inf
VOCABS = [49152, 128256, 151936]
ROWS = [1, 4, 32, 256]
SLOTS = 64  # of `support`
OPERATORS = [*dispatch.OPERATORS, "sample_cut"]
DIFFERENCE = " difference"  # ends the name of an operator in that direction
BASELINES = ["eager", "eager difference", "compiled", "read", "clone"]
NAMES = [
    *OPERATORS, *(name + DIFFERENCE for name in OPERATORS if name != "divergence"), *BASELINES,
]  # fmt: skip
WRITING = ("steer", "steering_vector", "eager", "compiled")  # a row of the vocabulary's width
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@cache
def rows(n: int, vocab: int, dtype: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(n, vocab, generator=generator) * 3
    adapted = base + torch.randn(n, vocab, generator=generator) * 0.5
    return adapted.to(DTYPES[dtype]), base.to(DTYPES[dtype])


def operator(name: str, z: Tensor, b: Tensor) -> tuple[Callable[[], Any], Tensor | None]:
    """Return a call and the output that it fills, None where the call returns its result."""
    n, k, (name, along) = len(z), 5, directed(name)
    token, logprob = torch.empty(n, dtype=torch.int64), torch.empty(n)
    mask, target = Mask((STRENGTH, None), ALPHA, -INF, along), torch.arange(n)
    greedy = Draw(0.0, 0, 1.0, 0.0, (0, None), (0, None))
    cut = greedy._replace(temperature=0.8, top_k=50, top_p=0.9, min_p=0.05)
    match name:
        case "steer":
            out = torch.empty_like(z)
            return partial(cpu.steer, z, b, mask, out), out
        case "sample":
            return partial(cpu.sample, z, b, mask, greedy, token, logprob), token
        case "sample_cut":
            return partial(cpu.sample, z, b, mask, cut, token, logprob), token
        case "topk":
            best, tokens = torch.empty(n, k), torch.empty(n, k, dtype=torch.int64)
            return partial(cpu.topk, z, b, mask, k, best, tokens), best
        case "score":
            return partial(cpu.score, z, b, mask, target, logprob), logprob
        case "project_strength":
            terms = torch.empty(n), torch.empty(n), torch.empty(n)
            inside = torch.empty(n, dtype=torch.bool)
            return partial(cpu.project_strength, z, b, target, ALPHA, along, *terms, inside), terms[
                0
            ]
        case "support":
            rest = target, ALPHA, along, SLOTS
            fields = dispatch.OPERATORS["support"].outputs(z, b, *rest)
            return partial(cpu.support, z, b, *rest, *fields), fields[2]
        case "divergence":
            return partial(cpu.divergence, z, b, logprob), logprob
        case "steering_vector":
            delta = torch.empty(z.shape)
            return partial(cpu.steering_vector, z, b, along, delta), delta
        case "eager":
            formula = eager if along == "projected" else eager_difference
            return partial(formula, z, b), None
        case "compiled":
            return partial(compiled(), z, b), None
        case "read":
            return lambda: (z.sum(-1), b.sum(-1)), None
        case "clone":
            return z.clone, None
    raise ValueError(name)


def directed(name: str) -> tuple[str, str]:
    """Return an operator or baseline and its direction."""
    bare = name.removesuffix(DIFFERENCE)
    return bare, "projected" if bare == name else "difference"


@pytest.fixture(autouse=True)
def small_memory() -> Iterator[None]:
    yield
    rows.cache_clear()


def check(name: str, result: Tensor, adapted: Tensor, base: Tensor) -> None:
    """Compare the first rows of a result with the reference."""
    if name in ("read", "clone"):
        return
    few, (name, along) = slice(0, 4), directed(name)
    z, b = adapted[few].double(), base[few].double()
    target, rtol = torch.arange(len(z)), 2**-7 if adapted.dtype == torch.bfloat16 else 1e-5
    to: dict[str, Any] = {"alpha": ALPHA, "direction": along}
    mask = {"strength": STRENGTH} | to
    if name in ("sample", "sample_cut"):
        cuts: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.05}
        want = reference.sample(z.float(), b.float(), **mask, **cuts if "cut" in name else {})
        assert torch.equal(result[few], want.token)
        return
    truths: dict[str, Callable[[], Tensor]] = {
        "topk": lambda: reference.topk(z, b, k=5, **mask).logprob,
        "score": lambda: reference.score(z, b, target=target, **mask),
        "project_strength": lambda: reference.project_strength(z, b, target, **to)[0],
        "support": lambda: reference.support(z, b, target, SLOTS, **to).delta,
        "divergence": lambda: reference.divergence(z, b),
        "steering_vector": lambda: reference.steering_vector(z, b, along),
    }
    truth = truths.get(name, lambda: reference.steer(z, b, **mask))()
    torch.testing.assert_close(result[few].double(), truth, rtol=rtol, atol=1e-5)


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operator(benchmark: BenchmarkFixture, name: str, n: int, vocab: int, dtype: str) -> None:
    adapted, base = rows(n, vocab, dtype)
    call, filled = operator(name, adapted, base)
    returned = call()
    check(name, returned if filled is None else filled, adapted, base)
    call()
    benchmark.group = f"{dtype} N={n} V={vocab}"
    large = n * vocab > 4_000_000
    benchmark.pedantic(call, rounds=50 if large else 100, iterations=1, warmup_rounds=3)
    moved = (3 if directed(name)[0] in WRITING else 2) * adapted.nbytes
    benchmark.extra_info |= {"bytes": moved, "machine": machine()}
    if benchmark.stats:
        benchmark.extra_info["GB/s"] = round(moved / benchmark.stats.stats.min / 1e9, 1)


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@pytest.mark.parametrize("name", ["steer", "sample", "ops.steer", "ops.sample"])
def test_host_overhead(benchmark: BenchmarkFixture, name: str) -> None:
    """Measure a call on one row of 8 tokens: only the way into C++ is left, or a checked call."""
    benchmark.group = "host overhead"
    z, b = torch.randn(1, 8), torch.randn(1, 8)
    checked = {
        "ops.steer": lambda: ops.steer(z, b, STRENGTH),
        "ops.sample": lambda: ops.sample(z, b, STRENGTH),
    }
    benchmark(checked[name] if name in checked else operator(name, z, b)[0])
    benchmark.extra_info["machine"] = machine()
