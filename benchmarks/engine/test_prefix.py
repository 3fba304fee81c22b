"""Measure when the second turn of a long chat has its first token, beside reading it anew.

    python -m benchmarks.run --only cpu_prefix

SmolLM2-135M, steered. The two take turns; CPU time on one thread counts, which other programs
hardly change.
"""

from contextlib import closing
from statistics import median
from time import process_time

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.engine.contenders import random_adapter, random_lora
from benchmarks.records import machine
from svd_engine import SteeredEngine, SteeringConfig, loading

ROUNDS, CONTEXT, ANSWER, QUESTION = 2, 960, 16, 16
GENERATOR = torch.Generator().manual_seed(0)


def test_second_turn(benchmark: BenchmarkFixture) -> None:
    base, _ = loading.load_base(loading.SMOLLM2, dtype=torch.float32)
    engine = SteeredEngine(random_adapter(base, random_lora()), steering=SteeringConfig(-1.0))
    threads, size = torch.get_num_threads(), engine.prefix_cache.max_bytes
    torch.set_num_threads(1)
    ids: list[int] = torch.randint(100, 40000, (CONTEXT + QUESTION,), generator=GENERATOR).tolist()
    measured: dict[str, list[float]] = {"read anew": [], "read on": []}
    texts, kept = [], 0

    def first_token(prompt: list[int]) -> float:
        start = process_time()
        with closing(engine.stream(prompt, max_new_tokens=2, eos_token_id=[])) as events:
            texts.append(next(events).token_id)
        return process_time() - start

    def one_round() -> None:
        nonlocal kept
        (first,) = engine.generate(ids[:CONTEXT], max_new_tokens=ANSWER, eos_token_id=[])
        prompt = ids[:CONTEXT] + first.token_ids + ids[CONTEXT:]
        kept = engine.prefix_cache.bytes
        measured["read on"].append(first_token(prompt))
        engine.prefix_cache.max_bytes = 0
        measured["read anew"].append(first_token(prompt))
        engine.prefix_cache.max_bytes = size

    benchmark.pedantic(one_round, rounds=ROUNDS)
    torch.set_num_threads(threads)
    assert texts[::2] == texts[1::2]
    benchmark.extra_info |= {
        "machine": machine(), "dtype": "float32", "tokens": CONTEXT + ANSWER + QUESTION,
        "kept_bytes": kept, "new_tokens": QUESTION,
        "contenders": {k: {"median": median(v), "min": min(v)} for k, v in measured.items()},
    }  # fmt: skip
