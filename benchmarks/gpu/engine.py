"""The engine's time per steered token, beside its rivals, at three sizes of model, at batches of
1 to 64 and contexts of 128 to 8192.

Weights are random, which makes no difference to the clock; SmolLM2-135M is real where it is
installed. The contenders take turns. A token's time is a difference, such as (129 new tokens - 65
new tokens) / 64, which leaves out prefill and set-up.
"""

import copy
import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.baselines import ALPHA, STRENGTH
from benchmarks.engine.contenders import (
    Prompts,
    differ,
    generate,
    hugging_face,
    naive,
    random_adapter,
    random_lora,
)
from benchmarks.gpu.measure import synchronize
from benchmarks.gpu.models import CONFIGS, TINY, load, random_model, vocabulary, weight_bytes
from benchmarks.gpu.worker import Run, words
from svd_engine.engine import SteeredEngine
from svd_engine.model.cuda_graphs import GraphedRunner
from svd_engine.steering_config import SteeringConfig

ROUNDS = 2
SHAPES = ((1, 128), (1, 1024), (1, 8192), (4, 128), (16, 128), (64, 128))  # batch, prompt tokens
# What is raced at how many of the shapes, and over how many tokens: the slow ones over fewer.
# transformers compiles the last one, so it comes last.
RACES: tuple[tuple[tuple[str, ...], int, tuple[int, int]], ...] = (
    (("steered", "adapted"), len(SHAPES), (65, 129)),
    (("steered", "steered, no graphs", "generate, merged", "naive", "sequential"), 1, (9, 25)),
    (("steered", "generate, static"), 2, (65, 129)),
)


class Contenders:
    """Every way to decode one model, and their times."""

    def __init__(self, run: Run, base: PreTrainedModel, end: float) -> None:
        self.run, self.end = run, end
        self.vocab = vocabulary(base)
        self.bytes = weight_bytes(base)
        self.model = random_adapter(base, random_lora())
        steering = SteeringConfig(STRENGTH, ALPHA)
        paired = SteeredEngine(self.model, steering=steering, pairing="paired")
        plain = SteeredEngine(self.model, steering=steering, pairing="paired", cuda_graphs=False)
        sequential = SteeredEngine(self.model, steering=steering, pairing="sequential")
        merged = copy.deepcopy(self.model).merge_and_unload()
        self.calls: dict[str, Callable[[Prompts, int], list[int]]] = {
            "steered": partial(generate, paired),
            "steered, no graphs": partial(generate, plain),
            "adapted": partial(generate, paired, model="adapted"),
            "generate, merged": partial(hugging_face, merged),
            "generate, static": partial(hugging_face, merged, cache_implementation="static"),
            "naive": partial(naive, self.model),
            "sequential": partial(generate, sequential),
        }

    def clock(self, call: Callable[[int], object], new: int) -> float:
        """Return the seconds of one call, the device's work included."""
        synchronize(self.run.device)
        start = perf_counter()
        call(new)
        synchronize(self.run.device)
        return perf_counter() - start

    def race(
        self,
        names: Sequence[str],
        batch: int,
        context: int,
        tokens: tuple[int, int],
        keep: Callable[[dict[str, Any]], None],
    ) -> None:
        """Measure seconds per token of each contender; `keep` gets them one by one at the end.

        tokens: two numbers of new tokens, whose times are subtracted.
        """
        few, many = tokens
        generator = torch.Generator().manual_seed(batch)
        shape = (batch, context)
        prompts = torch.randint(3, self.vocab, shape, generator=generator).tolist()
        calls: dict[str, Callable[[int], object]] = {}
        seconds: dict[str, list[float]] = {}
        for name in names:
            call = self.calls[name]
            about = {"batch": batch, "context": context, "contender": name}
            if time.time() > self.end:
                keep(about | {"skipped": "time"})
                continue
            try:  # the first call compiles and captures, at the lengths to come
                calls[name] = partial(call, prompts)
                once = self.clock(calls[name], many)
                if time.time() + once > self.end:
                    calls.pop(name)
                    keep(about | {"skipped": "time", "first call, ms/token": once / many * 1e3})
            except Exception as error:
                calls.pop(name, None)
                keep(about | {"error": words(error)})
                synchronize(self.run.device)
        for _ in range(ROUNDS):
            for name, ready in calls.items():
                if not seconds.get(name) or time.time() < self.end:
                    start, all_ = self.clock(ready, few), self.clock(ready, many)
                    seconds.setdefault(name, []).append((all_ - start) / (many - few))
        copy_rate = self.run.before("bandwidth").get("GB/s")
        for name, times in seconds.items():
            found: dict[str, Any] = {"batch": batch, "context": context, "contender": name}
            found["ms"] = median(times) * 1e3
            found["rounds"] = len(times)
            if "steered" in seconds:
                found["ratio"] = median(times) / median(seconds["steered"])
            if copy_rate and name not in ("naive", "sequential"):
                found["of weight bandwidth"] = self.bytes / copy_rate / 1e9 / median(times)
            keep(found)


def equality(run: Run) -> dict[str, Any]:
    """Check that every way to decode a tiny float32 model draws the same tokens, graphs or none."""
    model = random_adapter(random_model(TINY, run.device, torch.float32), random_lora(), std=0.2)
    steering, new = SteeringConfig(-4.0, ALPHA), 24
    replayed = SteeredEngine(model, steering=steering, pairing="paired")
    plain = SteeredEngine(model, steering=steering, pairing="paired", cuda_graphs=False)
    engines = {
        "replayed": replayed,
        "paired": plain,
        "sequential": SteeredEngine(model, steering=steering, pairing="sequential"),
    }
    prompts = [[5, 17, 40, 9, 33], [7], [101, 3, 88]]
    results: dict[str, Any] = {}
    for temperature in (0.0, 1.0):
        options: dict[str, Any] = {
            "max_new_tokens": new,
            "eos_token_id": [],
            "temperature": temperature,
        }
        drawn = {
            name: engine.generate(prompts, seed=5, **options) for name, engine in engines.items()
        }
        drawn["alone"] = [
            replayed.generate(prompt, seed=5 + i, **options)[0] for i, prompt in enumerate(prompts)
        ]
        said = []
        for name, rows in drawn.items():
            for i, (row, truth) in enumerate(zip(rows, drawn["paired"], strict=True)):
                if found := differ(plain, prompts[i], row.token_ids, truth.token_ids):
                    said.append(f"{name}, row {i}, {found}")
        results[f"temperature {temperature}"] = "; ".join(said) or "ok"
    results["as transformers"] = "; ".join(against_transformers(replayed, model)) or "ok"
    if run.device == "cuda":
        decoder = replayed._decoder(replayed.pair)
        assert isinstance(decoder, GraphedRunner)
        recorded = decoder.graphs
        failed = f", {decoder.failures} failed" if decoder.failures else ""
        results["CUDA graphs"] = f"{recorded} recorded{failed}"
    return results


def against_transformers(engine: SteeredEngine, model: PreTrainedModel) -> list[str]:
    """Say where the adapted model's texts differ from PEFT's own, after many long prompts."""
    prompts = [[(7 * i + 13 * row) % 190 + 5 for i in range(90 + 3 * row)] for row in range(20)]
    options: dict[str, Any] = {"model": "adapted", "max_new_tokens": 16, "eos_token_id": []}
    said = []
    for prompt, row in zip(prompts, engine.generate(prompts, **options), strict=True):
        want = hugging_face(model, [prompt], 16)
        if found := differ(engine, prompt, row.token_ids, want, model="adapted"):
            said.append(f"prompt of {len(prompt)}, {found}")
    return said


def section(run: Run) -> dict[str, Any]:
    """Check that tokens are equal, then race the contenders on each model."""
    cases: list[dict[str, Any]] = []
    result: dict[str, Any] = {"cases": cases}
    try:
        result["tokens equal"] = equality(run)
    except Exception as error:
        result["tokens equal"] = {"error": words(error)}
    run.keep(result, every=0)
    names = ["tiny"] if run.quick else list(CONFIGS)
    for i, name in enumerate(names):
        # Time that one model leaves goes to the next ones.
        end = time.time() + run.left() / (len(names) - i)
        if run.left() < 10 and not run.quick:
            cases.append({"model": name, "skipped": "time"})
            continue
        try:
            _race(run, name, end, cases, lambda: run.keep(result))
        except Exception as error:
            cases.append({"model": name, "error": words(error)})
        gc.collect()
        synchronize(run.device)
        torch.cuda.empty_cache()
    return result


def _race(
    run: Run, name: str, end: float, cases: list[dict[str, Any]], flush: Callable[[], None]
) -> None:
    if name == "tiny":
        base, origin = random_model(TINY, run.device, torch.float32), "random"
    else:
        with torch.device("meta"):
            size = weight_bytes(AutoModelForCausalLM.from_config(CONFIGS[name])) // 2
        if run.device == "cuda" and torch.cuda.mem_get_info()[0] < 2.5 * size + (6 << 30):
            cases.append({"model": name, "skipped": "memory"})
            return
        base, origin = load(name, run.device)
    contenders = Contenders(run, base, end)
    about = {"model": name, "weights": origin, "GB": contenders.bytes / 1e9}

    def keep(found: dict[str, Any]) -> None:
        cases.append(about | found)
        flush()

    shapes = SHAPES[::3] if run.quick else SHAPES
    for names, count, tokens in RACES:
        for batch, context in shapes[:count]:
            contenders.race(names, batch, context, (2, 4) if run.quick else tokens, keep)
