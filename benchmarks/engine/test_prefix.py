"""Measure when a long prompt has its first token: of both models and of one, and of a second turn.

    python -m benchmarks.run --only cpu_prefix

SmolLM2-135M with a LoRA. The contenders take turns; CPU time on one thread counts, which other
programs hardly change.
"""

from collections.abc import Iterator
from contextlib import closing
from statistics import median
from time import process_time

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.engine.contenders import random_adapter, random_lora
from benchmarks.records import machine
from svd_engine import SteeredEngine, SteeringConfig, loading

ROUNDS, CONTEXT, ANSWER, QUESTION = 2, 960, 16, 16
PROMPT, PROMPT_ROUNDS = 512, 7
GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def engine() -> Iterator[SteeredEngine]:
    base, _ = loading.load_base(loading.SMOLLM2, dtype=torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield SteeredEngine(random_adapter(base, random_lora()), steering=SteeringConfig(-1.0))
    torch.set_num_threads(threads)


def tokens(count: int) -> list[int]:
    ids: list[int] = torch.randint(100, 40000, (count,), generator=GENERATOR).tolist()
    return ids


def first_token(engine: SteeredEngine, prompt: list[int], model: str) -> tuple[float, int]:
    """Return the time of a request's first token, and the token."""
    start = process_time()
    with closing(engine.stream(prompt, max_new_tokens=2, eos_token_id=[], model=model)) as events:
        token = next(events).token_id
    return process_time() - start, token


def test_prompt(benchmark: BenchmarkFixture, engine: SteeredEngine) -> None:
    """Time a prompt that both models read, and one that the adapted model reads alone."""
    prompt = tokens(PROMPT)
    measured: dict[str, list[float]] = {"steered": [], "adapted": []}

    def one_round() -> None:
        for model, times in measured.items():
            engine.prefix_cache.clear()
            times.append(first_token(engine, prompt, model)[0])

    one_round()
    benchmark.pedantic(one_round, rounds=PROMPT_ROUNDS)
    steered, adapted = (times[1:] for times in measured.values())
    benchmark.extra_info |= {
        "machine": machine(), "dtype": "float32", "tokens": PROMPT,
        "contenders": {
            name: {"median": median(times), "min": min(times)}
            for name, times in (("steered", steered), ("adapted", adapted))
        },
        "ratio": median(a / b for a, b in zip(steered, adapted, strict=True)),
    }  # fmt: skip


def test_second_turn(benchmark: BenchmarkFixture, engine: SteeredEngine) -> None:
    """Time the second turn of a chat with the cache and without."""
    size, ids = engine.prefix_cache.max_bytes, tokens(CONTEXT + QUESTION)
    measured: dict[str, list[float]] = {"read anew": [], "read on": []}
    texts, kept = [], 0

    def one_round() -> None:
        nonlocal kept
        (first,) = engine.generate(ids[:CONTEXT], max_new_tokens=ANSWER, eos_token_id=[])
        prompt = ids[:CONTEXT] + first.token_ids + ids[CONTEXT:]
        kept = engine.prefix_cache.bytes
        for name, limit in (("read on", size), ("read anew", 0)):
            engine.prefix_cache.max_bytes = limit
            seconds, token = first_token(engine, prompt, "steered")
            measured[name].append(seconds)
            texts.append(token)
        engine.prefix_cache.max_bytes = size

    engine.prefix_cache.clear()
    benchmark.pedantic(one_round, rounds=ROUNDS)
    assert texts[::2] == texts[1::2]
    benchmark.extra_info |= {
        "machine": machine(), "dtype": "float32", "tokens": CONTEXT + ANSWER + QUESTION,
        "kept_bytes": kept, "new_tokens": QUESTION,
        "contenders": {k: {"median": median(v), "min": min(v)} for k, v in measured.items()},
    }  # fmt: skip
