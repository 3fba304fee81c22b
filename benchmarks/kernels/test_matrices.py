"""Measure a decode step's linear layers beside PyTorch's and beside reading their weights.

    pytest benchmarks/kernels/test_matrices.py --benchmark-json=runs/matrices.json

A round uses each of the 211 weights of SmolLM2-135M once, so every weight comes from memory.
"paired" adds a LoRA of rank 8 to the second half of the rows (to the row itself if there is one) in
the seven linears of each layer. Compare within one run. `extra_info` holds the bytes of the
weights, the rate at which the fastest round read them, and the speed relative to PyTorch's fastest
round.
"""

import time
from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from benchmarks.records import machine
from svd_engine.model.layers import linear
from svd_engine.ops import cpu

HIDDEN, INNER, KEYS, VOCAB, LAYERS, RANK = 576, 1536, 192, 49152, 30, 8
LAYER = [(HIDDEN, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN), (HIDDEN, HIDDEN)]
LAYER += [(INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDS = 10
Layers = list[tuple[Tensor, linear.LowRank | None]]  # a weight and its adapter
Inputs = dict[int, Tensor]  # by number of features


@cache
def model(dtype: str) -> Layers:
    torch.manual_seed(0)
    layers: Layers = []
    for out, fan_in in LAYER * LAYERS + [(VOCAB, HIDDEN)]:
        weight = torch.randn(out, fan_in).to(DTYPES[dtype])
        low_rank = (torch.randn(RANK, fan_in), torch.randn(out, RANK), None)
        layers.append((weight, None if out == VOCAB else low_rank))
    return layers


def step(name: str, layers: Layers, x: Inputs, first: int) -> Tensor:
    """Run every linear of a decode step and return the result of the last."""
    adapter = name.endswith("paired")
    product = linear._composed if name.startswith("pytorch") else linear.linear
    for weight, low_rank in layers:
        if name == "read":
            out = weight.view(torch.float32).sum(-1)
        elif name == "pytorch":
            out = nn.functional.linear(x[weight.shape[1]], weight)
        else:
            out = product(x[weight.shape[1]], weight, None, low_rank if adapter else None, first)
    return out


@cache
def pytorch_seconds(name: str, rows: int, dtype: str) -> float:
    """Return the seconds of PyTorch's fastest round."""
    layers, x = model(dtype), inputs(rows, dtype)
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        step(name, layers, x, rows // 2)
        best = min(best, time.perf_counter() - start)
    return best


def inputs(rows: int, dtype: str) -> Inputs:
    return {size: torch.randn(rows, size).to(DTYPES[dtype]) for size in (HIDDEN, INNER)}


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@pytest.mark.parametrize("name", ["read", "pytorch", "skinny", "pytorch paired", "skinny paired"])
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(benchmark: BenchmarkFixture, name: str, rows: int, dtype: str) -> None:
    layers, x = model(dtype), inputs(rows, dtype)
    with torch.inference_mode():
        if name.startswith("skinny"):
            got = step(name, layers, x, rows // 2)
            truth = x[HIDDEN].double() @ layers[-1][0].double().T
            torch.testing.assert_close(got.double(), truth, rtol=2**-7, atol=1e-3)
        benchmark.group = f"{dtype} rows={rows}"
        benchmark.pedantic(
            lambda: step(name, layers, x, rows // 2), rounds=ROUNDS, iterations=1, warmup_rounds=2
        )
        moved = sum(weight.nbytes for weight, _ in layers)
        benchmark.extra_info |= {"bytes": moved, "machine": machine()}
        if benchmark.stats:
            best = benchmark.stats.stats.min
            benchmark.extra_info["GB/s"] = round(moved / best / 1e9, 1)
            if name.startswith("skinny"):
                plain = pytorch_seconds(name.replace("skinny", "pytorch"), rows, dtype)
                benchmark.extra_info["times PyTorch's speed"] = round(plain / best, 2)
