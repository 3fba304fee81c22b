"""Measure a steered token beside plain decoding and the two-pass loop that people write.

    pytest benchmarks/engine/test_engine.py --benchmark-json=runs/engine.json

SmolLM2-135M-Instruct with a random adapter, greedy, no end of sequence. The contenders take turns:
each benchmark round runs every contender once, so drift of the machine affects all alike.
`extra_info` holds the comparison, by contender: seconds per token (or per request), and the ratio
to "steered" within the same round. A token's time is (64 new tokens - 1 new token) / 63, which
leaves out prefill and set-up. `--benchmark-min-rounds` sets the rounds (5).
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import pytest
import torch
from peft import PeftConfig, PrefixTuningConfig
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.baselines import ALPHA, STRENGTH
from benchmarks.engine.contenders import (
    TEXT,
    differ,
    generate,
    hugging_face,
    naive,
    random_adapter,
    random_lora,
)
from benchmarks.records import machine
from svd_engine import loading
from svd_engine.engine import SteeredEngine
from svd_engine.model.pair import PairedRunner
from svd_engine.steering_config import SteeringConfig

NEW = 64
SHAPES = ((8, 512), (512, 8), (8, 8))  # (prompt, new): the requests proxy-tuning is timed with
ADAPTERS: dict[str, PeftConfig] = {
    "LoRA": random_lora(),
    "prefix": PrefixTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM"),
}
Call = Callable[[int], object]  # new tokens -> anything


class Setup:
    """The model in one dtype with an adapter, every way to decode it, and a prompt."""

    def __init__(self, adapter: str, dtype: str) -> None:
        self.about = {"adapter": adapter, "dtype": dtype}
        base, tokenizer = loading.load_base(loading.SMOLLM2, dtype=getattr(torch, dtype))
        base.generation_config.eos_token_id = None
        self.prompt: list[int] = tokenizer(TEXT).input_ids
        model = random_adapter(base, ADAPTERS[adapter])
        steering = SteeringConfig(STRENGTH, ALPHA)
        self.engine = SteeredEngine(model, tokenizer, steering, "paired")
        sequential = SteeredEngine(model, tokenizer, steering, "sequential")
        self.contenders: dict[str, Callable[[list[list[int]], int], list[int]]] = {
            "steered": partial(generate, self.engine),
            "adapted": partial(generate, self.engine, model="adapted"),
            "sequential": partial(generate, sequential),
            "generate, PEFT": partial(hugging_face, model),
            "naive": partial(naive, model),
        }
        if adapter == "LoRA":  # a prefix cannot be merged
            merged = copy.deepcopy(model).merge_and_unload()
            self.contenders["generate, merged"] = partial(hugging_face, merged)

    def memory(self) -> dict[str, int]:
        """Return the engine's bytes: the weights of both models, each once, and both KV caches."""
        pair = self.engine.pair
        assert isinstance(pair, PairedRunner)
        runner = pair.runner
        weights = {p.data_ptr(): p.nbytes for p in runner.model.parameters()}
        cache = [t.nbytes for layer in runner.cache._layers.values() for t in layer]
        return {"weight_bytes": sum(weights.values()), "cache_bytes": sum(cache)}

    def check(self, tokens: Mapping[str, list[int]]) -> None:
        """Assert that contenders which decode the same distribution agree."""
        plain = [name for name in tokens if name == "adapted" or name.startswith("generate")]
        for model, names in (("steered", ["sequential", "naive"]), ("adapted", plain)):
            for name in names:
                found = differ(self.engine, self.prompt, tokens[name], tokens[model], model=model)
                assert found is None, f"{name}, {found}"


def on(*adapters: str) -> pytest.MarkDecorator:
    """Parametrise a test by adapter and dtype."""
    params = [(adapter, dtype) for adapter in adapters for dtype in ("float32", "bfloat16")]
    return pytest.mark.parametrize("setup", params, ids="-".join, indirect=True, scope="module")


@pytest.fixture(scope="module")
def setup(request: pytest.FixtureRequest) -> Setup:
    return Setup(*request.param)


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("benchmark_min_rounds")


def seconds_per_request(new: int, call: Call) -> float:
    start = perf_counter()
    call(new)
    return perf_counter() - start


def seconds_per_token(call: Call) -> float:
    first, all_ = (seconds_per_request(new, call) for new in (1, NEW))
    return (all_ - first) / (NEW - 1)


def take_turns(
    benchmark: BenchmarkFixture,
    rounds: int,
    calls: Mapping[str, Call],
    seconds_of: Callable[[Call], float],
    **about: Any,
) -> None:
    """Time rounds of all calls in turn, and put their statistics into `extra_info`."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}

    def one_round() -> None:
        for name, call in calls.items():
            seconds[name].append(seconds_of(call))

    benchmark.pedantic(one_round, rounds=rounds)
    benchmark.extra_info |= {"machine": machine(), **about}
    benchmark.extra_info["contenders"] = {
        name: summary(times, seconds["steered"]) for name, times in seconds.items()
    }


def summary(times: Sequence[float], steered: Sequence[float]) -> dict[str, float]:
    """Summarise a contender's times; "ratio" is to the steered times of the same rounds."""
    low, _, high = quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    return {
        "median": median(times),
        "min": min(times),
        "iqr": high - low,
        "rounds": len(times),
        "ratio": median(t / s for t, s in zip(times, steered, strict=True)),
    }


@on("LoRA", "prefix")
def test_token(benchmark: BenchmarkFixture, setup: Setup, rounds: int) -> None:
    """A token of one request, prefill left out."""
    calls = {name: partial(call, [setup.prompt]) for name, call in setup.contenders.items()}
    tokens = {name: call(NEW) for name, call in calls.items()}
    assert {len(got) for got in tokens.values()} == {NEW}
    if setup.about["dtype"] == "float32":
        setup.check(tokens)
    about = {"batch": 1, "prompt_tokens": len(setup.prompt), "new_tokens": NEW}
    take_turns(
        benchmark, rounds, calls, seconds_per_token, **setup.about, **about, **setup.memory()
    )


@on("LoRA")
def test_batch(benchmark: BenchmarkFixture, setup: Setup, rounds: int) -> None:
    """A step of 8 prompts of 8 lengths against a step of one prompt."""
    ragged = [setup.prompt[: len(setup.prompt) - 3 * i] for i in range(8)]
    sizes = {"steered": 1, "8 prompts": 8}
    calls = {name: partial(generate, setup.engine, ragged[:n]) for name, n in sizes.items()}
    for call in calls.values():
        call(NEW)
    about = {"batch": 8, "prompt_tokens": [len(prompt) for prompt in ragged], "new_tokens": NEW}
    take_turns(benchmark, rounds, calls, seconds_per_token, **setup.about, **about)
    for name, n in sizes.items():
        step = benchmark.extra_info["contenders"][name]
        step["tokens/s"] = n / step["median"]


@on("LoRA")
@pytest.mark.parametrize("prompt, new", SHAPES)
def test_request(
    benchmark: BenchmarkFixture, setup: Setup, rounds: int, prompt: int, new: int
) -> None:
    """A whole request, prefill included."""
    ids = (setup.prompt * -(-prompt // len(setup.prompt)))[:prompt]
    calls = {name: partial(call, [ids]) for name, call in setup.contenders.items()}
    for call in calls.values():
        call(2)
    about = {"batch": 1, "prompt_tokens": prompt, "new_tokens": new}
    if new > NEW:
        rounds = 1
    take_turns(benchmark, rounds, calls, partial(seconds_per_request, new), **setup.about, **about)
