"""Measure what each way to fewer steps or bytes gains on one request, alone and together.

    python -m benchmarks.run --only cpu_levers

SmolLM2-135M with a LoRA, batch 1: the second turn of a chat, whose answer repeats its prompt. The
contenders take turns; CPU time on one thread counts, which other programs hardly change.
"""

from collections.abc import Iterator
from statistics import median
from time import process_time
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.engine.contenders import random_adapter, random_lora
from benchmarks.engine.repeating import REPEATING
from benchmarks.records import machine
from svd_engine import SteeredEngine, SteeringConfig, loading

ROUNDS, BEFORE, TOKENS = 3, 400, 48
WEIGHTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "int8": {"dtype": torch.float32, "weights": "int8"},
}
# contender -> (weights, whether the first turn is kept, guesses)
CONTENDERS: dict[str, tuple[str, bool, str | None]] = {
    "none": ("float32", False, None),
    "the first turn is kept": ("float32", True, None),
    "guesses": ("float32", False, "prompt"),
    "int8": ("int8", False, None),
    "kept, guesses": ("float32", True, "prompt"),
    "kept, int8": ("int8", True, None),
    "guesses, int8": ("int8", False, "prompt"),
    "all three": ("int8", True, "prompt"),
}


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, SteeredEngine]]:
    threads, made = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    for name, options in WEIGHTS.items():
        base, tokenizer = loading.load_base(loading.SMOLLM2, **options)
        adapted = random_adapter(base, random_lora())
        made[name] = SteeredEngine(adapted, tokenizer, SteeringConfig(-1.0))
    yield made
    torch.set_num_threads(threads)


def test_levers(benchmark: BenchmarkFixture, engines: dict[str, SteeredEngine]) -> None:
    generator = torch.Generator().manual_seed(0)
    first: list[int] = torch.randint(100, 40000, (BEFORE,), generator=generator).tolist()
    tokenizer: Any = engines["int8"].tokenizer
    prompt = first + tokenizer.encode(REPEATING["list"])
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    texts: dict[str, set[tuple[int, ...]]] = {name: set() for name in WEIGHTS}

    def one_round() -> None:
        for name, (weights, keeps, guesses) in CONTENDERS.items():
            engine = engines[weights]
            engine.prefix_cache.clear()
            if keeps:
                engine.generate(first, max_new_tokens=1, eos_token_id=[])
            start = process_time()
            (done,) = engine.generate(
                prompt, max_new_tokens=TOKENS, eos_token_id=[], speculate=guesses
            )
            seconds[name].append(process_time() - start)
            texts[weights].add(tuple(done.token_ids))

    one_round()
    benchmark.pedantic(one_round, rounds=ROUNDS)
    assert all(len(each) == 1 for each in texts.values())
    seconds = {name: times[1:] for name, times in seconds.items()}
    benchmark.extra_info |= {
        "machine": machine(), "before": BEFORE, "tokens": TOKENS, "prompt": len(prompt),
        "contenders": {
            name: {
                "median": median(times), "min": min(times),
                "speedup": median(a / b for a, b in zip(seconds["none"], times, strict=True)),
            }
            for name, times in seconds.items()
        },
    }  # fmt: skip
