"""Measure a steered step over int8 and int4 codes, beside bfloat16 weights and llama.cpp.

    python -m benchmarks.run --only cpu_weights

SmolLM2-135M, batch 1, LoRA on all linear layers. The contenders take turns of some tokens each;
llama.cpp decodes one row, un-steered, with weights of the same kind (Q8_0, Q4_0).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from benchmarks.engine import peers
from benchmarks.engine.contenders import random_adapter, random_lora
from benchmarks.records import machine
from svd_engine import loading
from svd_engine.model.pair import ModelPair, pair_models
from svd_engine.model.peft_adapter import Adapter

# (dtype, weights); an int8 or int4 base computes in float32
KINDS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.float32, "weights": "int8"},
    "int4": {"dtype": torch.float32, "weights": "int4"},
}
ROUNDS, TOKENS, CONTEXT = 7, 16, 64


def pair_of(kind: str) -> ModelPair:
    model, _ = loading.load_base(loading.SMOLLM2, **KINDS[kind])
    return pair_models(Adapter.read(random_adapter(model, random_lora())), "paired")


def held(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, each counted once."""
    tensors = {x.data_ptr(): x for x in (*model.parameters(), *model.buffers())}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def decoder(pair: ModelPair, prompt: list[int]) -> Callable[[], float]:
    """Return what decodes some tokens and returns the seconds of one."""
    token = torch.tensor([5])

    def decode() -> float:
        pair.prefill([prompt], TOKENS + 1)
        pair.step(token)
        start = perf_counter()
        for _ in range(TOKENS):
            pair.step(token)
        return (perf_counter() - start) / TOKENS

    return decode


@pytest.fixture
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, peers.LlamaCpp]]:
    """llama.cpp with each kind of weights; none where it is not installed."""
    found: dict[str, peers.LlamaCpp] = {}
    with ExitStack() as stack:
        if peers.llama_cpp_is_installed():
            folder = tmp_path_factory.mktemp("gguf")
            for kind in KINDS:
                found[kind] = peers.LlamaCpp(kind, folder)
                stack.callback(found[kind].close)
        yield found


def test_weights(benchmark: BenchmarkFixture, llamas: dict[str, peers.LlamaCpp]) -> None:
    prompt = [1] * CONTEXT
    pairs: dict[str, Any] = {kind: pair_of(kind) for kind in KINDS}
    calls = {f"{kind}, steered": decoder(pair, prompt) for kind, pair in pairs.items()}
    for kind, llama in llamas.items():
        calls[f"{kind}, llama.cpp"] = partial(llama.seconds_per_token, prompt, TOKENS)
    measured: dict[str, list[float]] = {key: [] for key in calls}

    def one_round() -> None:
        for key, call in calls.items():
            measured[key].append(call())

    one_round()
    measured = {key: [] for key in calls}
    benchmark.pedantic(one_round, rounds=ROUNDS)
    benchmark.extra_info |= {
        "machine": machine(),
        "held": {kind: held(pair.runner.model) for kind, pair in pairs.items()},
        "rounds": ROUNDS,
        "contenders": {
            key: {"median": median(times), "min": min(times)} for key, times in measured.items()
        },
    }
