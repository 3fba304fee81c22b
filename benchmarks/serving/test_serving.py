"""Measure `svd-engine serve` under load: many clients, clients that join, many short requests.

    pytest benchmarks/serving --benchmark-json=runs/serving.json

Server and clients are two processes that share the processor. SmolLM2-135M in float32 with a random
LoRA; the short requests go to a random model of two layers with SmolLM2's vocabulary, since they
measure the server and not the model.
"""

import asyncio
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.engine.contenders import random_adapter, random_lora
from benchmarks.records import machine
from benchmarks.serving import server as servers
from svd_engine import SteeredEngine, SteeringConfig, loading

pytest.importorskip("fastapi", reason="needs the extra serve")

CLIENTS, NEW, ROUNDS = 16, 32, 3
STREAMED, JOINING, CHUNK = 120, 200, 64  # tokens of the stream, and of prompts that join
REQUESTS, AT_ONCE, LEAVE, KINDS, SHORT = 10_000, 64, 0.05, 40, 8


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    adapter = tmp_path_factory.mktemp("adapter")
    model, _ = loading.load_base(loading.SMOLLM2, dtype=torch.float32)
    random_adapter(model, random_lora()).save_pretrained(str(adapter))
    with servers.serve(loading.SMOLLM2, adapter, "--chunk", str(CHUNK)) as server:
        yield server


def prompt(seed: int, length: int) -> list[int]:
    return [random.Random(seed).randrange(100, 40_000) for _ in range(length)]


def record(benchmark: BenchmarkFixture, work: Any) -> None:
    """Run once; what it measured is the result."""
    measured = benchmark.pedantic(lambda: asyncio.run(work()), rounds=1, iterations=1)
    benchmark.extra_info.update(measured, machine=machine())


def test_many_clients(benchmark: BenchmarkFixture, smollm2: servers.Server) -> None:
    prompts = [prompt(i, 32) for i in range(CLIENTS)]

    async def measure() -> dict[str, Any]:
        rounds = []
        for i in range(ROUNDS):
            alone = await servers.tokens_per_second(smollm2, [prompts[i]], NEW)
            rounds.append((alone, await servers.tokens_per_second(smollm2, prompts, NEW)))
        return dict(
            clients=CLIENTS,
            alone=median(alone for alone, _ in rounds),
            together=median(together for _, together in rounds),
            ratio=median(together / alone for alone, together in rounds),
        )

    record(benchmark, measure)


def test_others_join(benchmark: BenchmarkFixture, smollm2: servers.Server) -> None:
    """A stream alone, and while another client asks again and again, with long prompts."""

    async def gaps(client: Any) -> list[float]:
        times = [at async for at, _ in servers.stream(client, prompt(0, 32), STREAMED)]
        return [later - at for at, later in pairwise(times[1:])]

    async def join(client: Any, count: list[int]) -> None:
        while True:
            await servers.complete(client, prompt(100 + count[0], JOINING), 8)
            count[0] += 1

    async def measure() -> dict[str, Any]:
        async with smollm2.client() as client:
            await gaps(client)
            alone, count = await gaps(client), [0]
            joining = asyncio.create_task(join(client, count))
            beside = await gaps(client)
            joining.cancel()
        found: dict[str, Any] = dict(joined=count[0], prompt=JOINING, chunk=CHUNK)
        for name, each in (("alone", alone), ("beside", beside)):
            found[name] = dict(median=median(each), p99=quantiles(each, n=100)[98], max=max(each))
        return found | {"ratio": median(beside) / median(alone)}

    record(benchmark, measure)


def test_short_requests(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """None is lost, none mixed up, whoever leaves; and the server's memory does not grow."""
    _, tokenizer = loading.load_base(loading.SMOLLM2)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    random_adapter(model, random_lora()).save_pretrained(str(tmp_path / "adapter"))
    folders = tmp_path / "base", tmp_path / "adapter"
    engine = SteeredEngine.from_pretrained(*folders, steering=SteeringConfig(-4.0))
    prompts = [prompt(i, 3 + i % 9) for i in range(KINDS)]
    alone = [engine.generate(p, max_new_tokens=SHORT)[0].text for p in prompts]
    choice = random.Random(0)
    asked = [(choice.randrange(KINDS), choice.random() < LEAVE) for _ in range(REQUESTS)]

    async def measure(server: servers.Server) -> dict[str, Any]:
        counts, memory, left = dict(right=0, wrong=0, gone=0), [server.memory], iter(asked)

        async def ask(client: Any) -> None:
            for kind, leaves in left:
                if leaves:
                    async for _ in servers.stream(client, prompts[kind], SHORT):
                        break
                    counts["gone"] += 1
                else:
                    answer = await servers.complete(client, prompts[kind], SHORT)
                    is_right = answer["choices"][0]["text"] == alone[kind]
                    counts["right" if is_right else "wrong"] += 1
                if sum(counts.values()) % (REQUESTS // 10) == 0:
                    memory.append(server.memory)

        start = perf_counter()
        async with server.client() as client:
            await asyncio.gather(*(ask(client) for _ in range(AT_ONCE)))
            seconds = perf_counter() - start
            shown = (await client.get("/metrics")).text
        assert "svd_engine_running 0.0" in shown and "svd_engine_waiting 0.0" in shown
        assert counts["right"] + counts["gone"] == REQUESTS
        return dict(
            requests=REQUESTS, at_once=AT_ONCE, **counts, seconds=seconds,
            per_second=REQUESTS / seconds, memory_mib=memory,
        )  # fmt: skip

    with servers.serve(*folders) as server:
        record(benchmark, lambda: measure(server))
