"""What do the operators cost on the CPU, beside what one would write otherwise?

    pytest benchmarks/test_operators.py --benchmark-json=benchmarks/results/cpu_operators.json

Every case is checked against the reference before it is timed. Compare within one run: the
baselines are the paper's formula in eager PyTorch, `torch.compile` of the form in which the base
softmax cancels, reading both rows (their sums) and copying one. `extra_info` holds the bytes of the
rows that have to be read and written, and the rate at which the fastest round moved them.
"""

import math
from functools import cache, partial

import cpuinfo
import pytest
import torch
from baselines import ALPHA, STRENGTH, cancelled, eager

from svd_engine import ops
from svd_engine.kernels import reference
from svd_engine.kernels.arguments import Draw, Mask
from svd_engine.ops import cpu, dispatch

INF = math.inf
VOCABS = [49152, 128256, 151936]
ROWS = [1, 4, 32, 256]
NAMES = [*dispatch.OPERATORS, "sample_cut", "eager", "compiled", "read", "clone"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def compiled():
    torch.compiler.reset()  # each case is compiled for its shape, and there is a limit to how many
    return torch.compile(cancelled, dynamic=False, fullgraph=True)


@cache
def machine():
    name, threads = cpuinfo.get_cpu_info().get("brand_raw", "CPU"), torch.get_num_threads()
    return f"{name}, {threads} threads, {cpu.capability()}, torch {torch.__version__}"


@cache
def rows(n, vocab, dtype):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(n, vocab, generator=generator) * 3
    adapted = base + torch.randn(n, vocab, generator=generator) * 0.5
    return adapted.to(DTYPES[dtype]), base.to(DTYPES[dtype])


def operators(adapted, base, wanted=""):
    """name -> (callable, rows moved: 2 read, and 1 more when one is written)."""
    out = torch.empty_like(adapted)
    token, logprob = torch.empty(len(adapted), dtype=torch.int64), torch.empty(len(adapted))

    def steer():
        cpu.steer(adapted, base, mask, out)
        return out

    def sample():
        cpu.sample(adapted, base, mask, greedy, token, logprob)
        return token

    n, k = len(adapted), 5
    target = torch.arange(n)
    best, tokens = torch.empty(n, k), torch.empty(n, k, dtype=torch.int64)
    terms = [torch.empty(n) for _ in range(3)] + [torch.empty(n, dtype=torch.bool)]
    delta = torch.empty(adapted.shape) if "steering_vector" in wanted else None
    mask = Mask((STRENGTH, None), ALPHA, -INF)
    greedy = Draw(0.0, 0, 1.0, 0.0, (0, None), (0, None))
    cut = greedy._replace(temperature=0.8, top_k=50, top_p=0.9, min_p=0.05)

    def returning(result, launcher, *arguments):
        return lambda: launcher(adapted, base, *arguments) or result

    return {
        "steer": (steer, 3),
        "sample": (sample, 2),
        "sample_cut": (
            returning(token, cpu.sample, mask, cut, token, logprob), 2,
        ),
        "topk": (returning(best, cpu.topk, mask, k, best, tokens), 2),
        "score": (returning(logprob, cpu.score, mask, target, logprob), 2),
        "project_strength": (
            returning(terms[0], cpu.project_strength, target, ALPHA, *terms), 2,
        ),
        "divergence": (returning(logprob, cpu.divergence, logprob), 2),
        "steering_vector": (returning(delta, cpu.steering_vector, delta), 3),
        "eager": (lambda: eager(adapted, base), 3),
        "compiled": (partial(compiled(), adapted, base), 3),
        "read": (lambda: (adapted.sum(-1), base.sum(-1)), 2),
        "clone": (adapted.clone, 2),
    }  # fmt: skip


@pytest.fixture(autouse=True)
def small_memory():
    yield
    rows.cache_clear()


def check(name, result, adapted, base):
    if name in ("read", "clone"):
        return
    few = slice(0, 4)
    z, b = adapted[few].double(), base[few].double()
    target, rtol = torch.arange(len(z)), 2**-7 if adapted.dtype == torch.bfloat16 else 1e-5
    options = {"strength": STRENGTH, "alpha": ALPHA}
    if name in ("sample", "sample_cut"):
        cuts = dict(temperature=0.8, top_k=50, top_p=0.9, min_p=0.05) if "cut" in name else {}
        z, b = z.float(), b.float()
        assert torch.equal(result[few], reference.sample(z, b, **options, **cuts).token)
        return
    truth = {
        "topk": lambda: reference.topk(z, b, k=5, **options).logprob,
        "score": lambda: reference.score(z, b, target=target, **options),
        "project_strength": lambda: reference.project_strength(z, b, target, alpha=ALPHA)[0],
        "divergence": lambda: reference.divergence(z, b),
        "steering_vector": lambda: reference.steering_vector(z, b),
    }.get(name, lambda: reference.steer(z, b, **options))()
    torch.testing.assert_close(result[few].double(), truth, rtol=rtol, atol=1e-5)


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operator(benchmark, name, n, vocab, dtype):
    adapted, base = rows(n, vocab, dtype)
    call, moved = operators(adapted, base, name)[name]
    check(name, call(), adapted, base)
    call()
    benchmark.group = f"{dtype} N={n} V={vocab}"
    large = n * vocab > 4_000_000
    benchmark.pedantic(call, rounds=50 if large else 100, iterations=1, warmup_rounds=3)
    moved *= n * vocab * adapted.element_size()
    benchmark.extra_info |= {"bytes": moved, "machine": machine()}
    if benchmark.stats:
        benchmark.extra_info["GB/s"] = round(moved / benchmark.stats.stats.min / 1e9, 1)


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@pytest.mark.parametrize("name", ["steer", "sample", "ops.steer", "ops.sample"])
def test_host_overhead(benchmark, name):
    """A call on one row of 8 tokens: what is left is the way into C++, or all of a checked call."""
    benchmark.group = "host overhead"
    rows = torch.randn(1, 8), torch.randn(1, 8)
    checked = {
        "ops.steer": lambda: ops.steer(*rows, STRENGTH),
        "ops.sample": lambda: ops.sample(*rows, STRENGTH),
    }
    benchmark(checked[name] if name in checked else operators(*rows)[name][0])
    benchmark.extra_info["machine"] = machine()
