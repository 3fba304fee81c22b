"""Measure one decode step by context, batch and new tokens, and what it spends its time on.

    pytest benchmarks/engine/test_step.py --benchmark-json=runs/step.json

The contenders take turns, one step each a turn: rows of several contexts and batches, the adapted
rows alone, 8 new tokens in one row, and reading the weights once. llama.cpp takes its turn where
llama-cpp-python is installed. The KV cache is filled with one number instead of a prompt. Times
are of the native call from embeddings to logits; "linear", "attention" and "rest" are its parts.
"""

from collections.abc import Callable, Iterator
from statistics import mean, median
from time import perf_counter
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from benchmarks.engine import peers
from benchmarks.engine.contenders import random_adapter, random_lora
from benchmarks.records import machine
from svd_engine import loading
from svd_engine.model.pair import pair_models
from svd_engine.model.peft_adapter import Adapter

CONTEXTS, BATCHES, NEW = (128, 1024, 4096), (4, 8, 16), 8
ROUNDS, TURN = 7, 3  # a turn is so many steps after a first one; their mean counts
PARTS = ("linear", "attention", "rest")
QWEN = Qwen2Config(
    vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
    num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=8192,
    tie_word_embeddings=True,
)  # fmt: skip
MODELS = (("SmolLM2-135M", "float32"), ("SmolLM2-135M", "bfloat16"), ("Qwen2.5-0.5B", "bfloat16"))


def base_model(name: str, dtype: str) -> PreTrainedModel:
    """Load SmolLM2, or make a model of random weights."""
    if name == "SmolLM2-135M":
        return loading.load_base(loading.SMOLLM2, dtype=getattr(torch, dtype))[0]
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(QWEN, dtype=getattr(torch, dtype))
    return model


class Steps:
    """Single steps of a paired model, timed in the native call."""

    def __init__(self, model: PreTrainedModel) -> None:
        pair: Any = pair_models(Adapter.read(random_adapter(model, random_lora())))
        self.runner = pair.runner
        if self.runner.native is None:
            pytest.skip(f"no native step: {self.runner.how}")

    def prepare(
        self, batch: int = 1, context: int = 128, new: int = 1, adapted_alone: bool = False
    ) -> Callable[[], list[float]]:
        """Make room for a step; return what runs it and returns the seconds of its parts."""
        runner, rows = self.runner, batch if adapted_alone else 2 * batch
        plan = runner.native.plan
        generator = torch.Generator().manual_seed(0)
        embedded = torch.randn(rows, new, len(plan.norm.weight), generator=generator)
        embedded = embedded.to(runner.native.dtype)
        hidden = torch.empty_like(embedded)
        logits = embedded.new_empty(rows, new, len(plan.head.weight))
        positions = torch.full((rows,), context)

        @torch.inference_mode()
        def step() -> list[float]:
            runner.prefill([[1]] * (2 * batch), max_new_tokens=context + new)
            for layer in range(len(plan.layers)):
                for stored in runner.cache.stored(layer):
                    stored.fill_(0.1)
            runner.native._prepare(runner.cache)
            turns = []
            for _ in range(1 + TURN):
                seconds = torch.zeros(len(PARTS), dtype=torch.float64)
                torch.ops.svd_engine_cpu.decode(
                    runner.native._words, runner.native._caches, embedded, positions,
                    0 if adapted_alone else batch, hidden, logits, seconds,
                )  # fmt: skip
                turns.append(seconds.tolist())
            return [mean(part) for part in zip(*turns[1:], strict=True)]

        return step


@pytest.fixture
def llama(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[peers.LlamaCpp | None]:
    """llama.cpp with the same weights; None where it is not installed or has none of them."""
    name, dtype = request.param
    if name != "SmolLM2-135M" or not peers.llama_cpp_is_installed():
        yield None
        return
    peer = peers.LlamaCpp(dtype, tmp_path_factory.mktemp("gguf"))
    yield peer
    peer.close()


@pytest.mark.parametrize("name, dtype, llama", [(*m, m) for m in MODELS], indirect=["llama"])
def test_step(
    benchmark: BenchmarkFixture, name: str, dtype: str, llama: peers.LlamaCpp | None
) -> None:
    steps = Steps(base_model(name, dtype))
    weights = peers.weights_of(steps.runner.model)

    def limit() -> list[float]:
        seconds = []
        for _ in range(1 + TURN):
            start = perf_counter()
            peers.read(weights)
            seconds.append(perf_counter() - start)
        return [mean(seconds[1:])]

    calls: dict[str, Callable[[], list[float]]] = {"read": limit, "steered": steps.prepare()}
    calls |= {f"context {n}": steps.prepare(context=n) for n in CONTEXTS[1:]}
    calls |= {f"batch {n}": steps.prepare(batch=n) for n in BATCHES}
    calls |= {
        f"{NEW} new": steps.prepare(new=NEW),
        "adapted": steps.prepare(adapted_alone=True),
    }
    if llama is not None:
        calls["llama.cpp"] = lambda: [llama.seconds_per_token([1] * 128, 16)]
    measured: dict[str, list[list[float]]] = {key: [] for key in calls}

    def one_round() -> None:
        for key, call in calls.items():
            measured[key].append(call())

    one_round()
    measured = {key: [] for key in calls}
    benchmark.pedantic(one_round, rounds=ROUNDS)
    benchmark.extra_info |= {"machine": machine(), "model": name, "dtype": dtype}
    benchmark.extra_info["weight_bytes"] = sum(w.nbytes for w in weights)
    benchmark.extra_info["contenders"] = {
        key: summary(times, measured["steered"]) for key, times in measured.items()
    }


def summary(times: list[list[float]], steered: list[list[float]]) -> dict[str, float]:
    """Summarise a contender's steps; "ratio" is to the steered step of the same round."""
    whole = list(map(sum, times))
    found = {
        "median": median(whole),
        "min": min(whole),
        "ratio": median(t / sum(s) for t, s in zip(whole, steered, strict=True)),
        "rounds": len(whole),
    }
    if len(times[0]) == len(PARTS):
        found |= dict(zip(PARTS, map(median, zip(*times, strict=True)), strict=True))
    return found
