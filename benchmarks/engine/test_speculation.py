"""Measure what guesses cost and gain, beside the same engine without: SmolLM2-135M, batch 1.

    python -m benchmarks.run --only cpu_speculation

The contenders take turns: steps of several new tokens, then whole texts with and without look-up.
CPU time on one thread counts, which other programs hardly change. The engine has learned what steps
cost from a text that is not measured.
"""

from collections.abc import Iterator
from statistics import median
from time import process_time
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.engine.contenders import random_adapter, random_lora
from benchmarks.engine.repeating import QUESTIONS, REPEATING
from benchmarks.records import machine
from svd_engine import SteeredEngine, SteeringConfig, loading

TEXTS = {"repeating": REPEATING, "questions": QUESTIONS}
ROUNDS, TOKENS = 2, 48
STEP_ROUNDS, NEW, CONTEXT = 9, (1, 2, 3, 5, 9), 128


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest) -> Iterator[SteeredEngine]:
    base, tokenizer = loading.load_base(loading.SMOLLM2, dtype=getattr(torch, request.param))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    engine = SteeredEngine(random_adapter(base, random_lora()), tokenizer, SteeringConfig(-1.0))
    engine.prefix_cache.max_bytes = 0
    yield engine
    torch.set_num_threads(threads)


def about(engine: SteeredEngine) -> dict[str, Any]:
    return {"machine": machine(), "dtype": str(engine.model.dtype).removeprefix("torch.")}


def test_steps(benchmark: BenchmarkFixture, engine: SteeredEngine) -> None:
    """Time a step of one sequence by its new tokens."""
    pair, measured = engine.pair, {new: list[float]() for new in NEW}
    pair.prefill([[1] * CONTEXT], max_new_tokens=max(NEW))

    def one_round() -> None:
        for new in NEW:
            start = process_time()
            pair.step(torch.full((1, new), 5))
            measured[new].append(process_time() - start)
            pair.set_back(torch.tensor([new]))

    one_round()
    benchmark.pedantic(one_round, rounds=STEP_ROUNDS)
    contenders = {}
    for new, (_, *times) in measured.items():
        ratios = [a / b for a, b in zip(times, measured[1][1:], strict=True)]
        contenders[str(new)] = {
            "median": median(times), "min": min(times), "ratio": median(ratios)
        }  # fmt: skip
    benchmark.extra_info |= about(engine) | {"contenders": contenders}


@pytest.mark.parametrize("texts", TEXTS)
def test_texts(benchmark: BenchmarkFixture, engine: SteeredEngine, texts: str) -> None:
    """Time greedy texts with look-up and without."""
    pair: Any = engine.pair
    found: dict[str, list[Any]] = {}
    step, steps = pair.step, []

    def counted(tokens: torch.Tensor, *args: Any) -> Any:
        steps.append(tokens.shape)
        return step(tokens, *args)

    def decode(prompt: str, speculate: str | None) -> tuple[list[int], float, int]:
        steps.clear()
        start = process_time()
        (done,) = engine.generate(prompt, max_new_tokens=TOKENS, speculate=speculate)
        return done.token_ids, process_time() - start, len(steps)

    def one_round() -> None:
        for name, prompt in TEXTS[texts].items():
            plain, guessed = decode(prompt, None), decode(prompt, "prompt")
            assert plain[0] == guessed[0]
            found.setdefault(name, []).append((len(plain[0]), plain[1:], guessed[1:]))

    pair.step = counted
    try:
        decode(REPEATING["list"], "prompt")
        benchmark.pedantic(one_round, rounds=ROUNDS)
    finally:
        del pair.step
    benchmark.extra_info |= about(engine) | {
        "texts": texts,
        "contenders": {
            name: {
                "tokens": rounds[0][0],
                "per step": median((n - 1) / max(1, guessed[1]) for n, _, guessed in rounds),
                "speedup": median(plain[0] / guessed[0] for _, plain, guessed in rounds),
            }
            for name, rounds in found.items()
        },
    }
