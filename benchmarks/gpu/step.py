"""The decode step of kernels: is it right, how long does a token take, and each of its kernels?

The checks run in processes side by side, which also compile what the timing needs. The step is
compared with the model's own modules, replayed with not replayed, and rows alone with rows in a
batch, bit for bit.
"""

import copy
import gc
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma2Config, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from benchmarks.engine.contenders import random_adapter, random_lora
from benchmarks.gpu.measure import synchronize
from benchmarks.gpu.models import CONFIGS, random_model, vocabulary, weight_bytes
from benchmarks.gpu.worker import Run, words
from benchmarks.records import ROOT
from svd_engine import ops
from svd_engine.model.cuda_graphs import GraphedRunner
from svd_engine.model.pair import PairedRunner, SequentialRunner, adapted_runner, pair_models
from svd_engine.model.peft_adapter import Adapter

_SMALL: dict[str, Any] = dict(
    vocab_size=211, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=None,
    eos_token_id=None, pad_token_id=None, initializer_range=0.1,
)  # fmt: skip
TINY: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SMALL),
    "qwen2": Qwen2Config(**_SMALL),
    "qwen3": Qwen3Config(**_SMALL, head_dim=64),
    "gemma2": Gemma2Config(**_SMALL, head_dim=64, sliding_window=48, query_pre_attn_scalar=64),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2}
REAL = ("SmolLM2-135M", "Qwen2.5-1.5B")
# (batch, context): those that matter most come first, in case time runs out.
SHAPES = ((1, 128), (1, 1024), (16, 128), (1, 8192), (4, 1024), (16, 1024), (4, 128))
STEPS = 20
WALK_STEPS = 8  # by the modules, and only of the first shape
PROMPTS = [[5, 17, 40, 9, 33], [101], [7, 7, 120, 3, 88, 61, 14, 90, 55]]


def adapter_of(name: str, device: str, dtype: torch.dtype) -> tuple[Adapter, Any]:
    """Return a random model of that name with a random LoRA, and its base model."""
    config = TINY.get(name) or CONFIGS[name]
    base = random_model(copy.deepcopy(config), device, dtype)
    std = 0.2 if name in TINY else 0.02  # what is wrong must show, and rounding not grow
    return Adapter.read(random_adapter(base, random_lora(), std=std)), base


def fill(pair: PairedRunner, rows: list[int], length: int) -> None:
    """Give every row of both models keys and values that depend on its number alone."""
    pair.prefill([[1]] * len(rows), length + 40)
    layers = len(pair.runner.model.get_decoder().layers)
    for layer in range(layers):
        for stored in pair.runner.cache.stored(layer):
            for half in stored[: 2 * len(rows)].chunk(2):
                for place, row in zip(half, rows, strict=True):
                    generator = torch.Generator().manual_seed(row + 100 * layer)
                    drawn = torch.randn(length, *place[:, 0].shape, generator=generator)
                    place[:, :length] = drawn.transpose(0, 1).to(place)
    lengths = torch.tensor([length - 7 * row for row in rows], device=pair.device)
    pair.runner.positions.copy_(lengths.repeat(2))


def _off(got: Tensor, want: Tensor) -> float:
    """Return the greatest error of a row, relative to its norm."""
    off = (got.float() - want.float()).norm(dim=-1) / want.float().norm(dim=-1)
    return float(off.max().nan_to_num(torch.inf))


@torch.inference_mode()
def check(name: str, dtype: str, device: str) -> dict[str, Any]:
    """Compare the step of one model in every way."""
    started = time.time()
    adapter, _ = adapter_of(name, device, DTYPES[dtype])
    pair = pair_models(adapter, "paired")
    assert isinstance(pair, PairedRunner)
    found: dict[str, Any] = {"model": name, "dtype": dtype, "step": pair.runner.how}
    if pair.runner.native is None:
        return found
    walk = PairedRunner(adapter)
    tokens = torch.tensor([[3, 30, 12, 9], [50, 1, 77, 8], [99, 98, 2, 41]], device=device)
    for runner in (pair, walk):
        runner.prefill(PROMPTS, 16)
    errors = []
    for part in (tokens[:, :1], tokens[:, 1:]):
        for got, want in zip(pair.extend(part), walk.extend(part), strict=True):
            errors.append(_off(got, want))
    found["error"] = max(errors)
    found["right"] = found["error"] <= TOLERANCE[dtype]
    length, count = (700, 3) if device == "cuda" else (40, 1)

    def steps(rows: list[int], step: Callable[[Tensor], Any]) -> list[Tensor]:
        fill(pair, rows, length)
        return [torch.stack([x.clone() for x in step(tokens[rows, i])]) for i in range(count)]

    together = steps([0, 1, 2], pair.step)
    fill(walk, [0, 1, 2], length)
    by_modules = [torch.stack(walk.step(tokens[:, i])) for i in range(count)]
    far = [_off(x, y) for x, y in zip(together, by_modules, strict=True)]
    found["error far away"] = max(far)
    found["right"] &= found["error far away"] <= TOLERANCE[dtype]
    alone = [steps([row], pair.step) for row in range(3)]
    found["alone = in a batch"] = all(
        torch.equal(together[i][:, row], alone[row][i][:, 0])
        for row in range(3)
        for i in range(count)
    )
    if device == "cuda":
        graphed = GraphedRunner(pair)

        def replayed(step_tokens: Tensor) -> Any:
            graphed._rows, graphed._slots, graphed._next_position = 3, pair.runner.cache.slots, 800
            return graphed.step(step_tokens)

        again = [steps([0, 1, 2], replayed) for _ in range(2)][-1]
        found["graphs"] = graphed.graphs
        found["replayed = not"] = all(map(torch.equal, again, together))
    return found | {"seconds": time.time() - started}


def checks(run: Run) -> list[dict[str, Any]]:
    """Run every check in a process of its own, side by side."""
    real = () if run.device == "cpu" else REAL
    asked = [(name, dtype) for name in TINY for dtype in DTYPES]
    asked += [(name, "bfloat16") for name in real]
    if run.device == "cpu":
        asked = asked[:1]
    code = "import sys; from benchmarks.gpu import step; step.child(*sys.argv[1:])"
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    if run.device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *pair, run.device], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for pair in asked
    ]  # fmt: skip
    # On a GPU the timing takes the rest.
    found, end = [], time.time() + run.left() * (0.6 if run.device == "cuda" else 0.95)
    for (name, dtype), process in zip(asked, started, strict=True):
        about = {"model": name, "dtype": dtype}
        try:
            out, said = process.communicate(timeout=max(1.0, end - time.time()))
            lines = [line for line in out.splitlines() if line.startswith("{")]
            found.append(json.loads(lines[-1]) if lines else about | {"error": said[-1500:]})
        except subprocess.TimeoutExpired:
            process.kill()
            found.append(about | {"error": "time"})
    return found


def child(name: str, dtype: str, device: str) -> None:
    """Check one model and print what was found."""
    try:
        found = check(name, dtype, device)
    except Exception as error:
        found = {"model": name, "dtype": dtype, "error": words(error)}
    print(json.dumps(found), flush=True)


@torch.inference_mode()
def per_token(decoder: GraphedRunner, steered: bool, batch: int, context: int, steps: int) -> float:
    """Return milliseconds per token, the choice of the token included."""
    decoder.prefill([[1]] * batch, context + 2 * STEPS)
    pair = decoder.pair
    runners = (pair.runner,) if isinstance(pair, PairedRunner) else pair.runners
    for runner in runners:
        runner.positions.fill_(context)
    decoder._next_position = context
    tokens = torch.ones(batch, dtype=torch.int64, device=decoder.device)

    def one() -> None:
        nonlocal tokens
        logits = decoder.step(tokens)
        if steered:
            tokens = ops.sample(logits[0], logits[-1], -4.0, alpha=0.1)[0]
        else:
            tokens = ops.sample(logits[0], logits[0], 0.0, alpha=0.0)[0]
        tokens = tokens.clamp(min=0)

    for _ in range(3):
        one()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(steps):
        one()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / steps


@torch.inference_mode()
def kernels(pair: PairedRunner, context: int) -> dict[str, Any]:
    """Return microseconds of each kernel in a step of one sequence, per call, and its calls."""
    pair.prefill([[1]], context + 8)
    pair.runner.positions.fill_(context)
    tokens = torch.ones(1, dtype=torch.int64, device=pair.device)
    pair.step(tokens)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        pair.step(tokens)
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name[:60]].append(event.device_time)
    return {
        name: {"calls": len(each), "us each": sum(each) / len(each), "us": sum(each)}
        for name, each in sorted(times.items(), key=lambda item: -sum(item[1]))
    }


def race(run: Run, name: str, cases: list[dict[str, Any]], end: float) -> dict[str, Any]:
    """Time one model: steered, the adapted one alone, and steered by its modules."""
    adapter, base = adapter_of(name, "cuda", torch.bfloat16)
    pair, walk = pair_models(adapter, "paired"), PairedRunner(adapter)
    single = SequentialRunner(adapted_runner(adapter))
    assert isinstance(pair, PairedRunner)
    about = {"model": name, "MB": weight_bytes(base) / 1e6, "vocabulary": vocabulary(base)}
    result = about | {"step": pair.runner.how, "adapted": single.runners[0].how}
    contenders = {
        "steered": (GraphedRunner(pair), True),
        "adapted": (GraphedRunner(single), False),
        "walk": (GraphedRunner(walk), True),
    }
    try:
        result["kernels"] = kernels(pair, 1024)
    except Exception as error:
        result["kernels"] = {"error": words(error)}
    for batch, context in SHAPES:
        case: dict[str, Any] = {"model": name, "batch": batch, "context": context}
        for contender, (decoder, steered) in contenders.items():
            is_walk = contender == "walk"
            if is_walk and (batch, context) != SHAPES[0]:
                continue
            if time.time() > end:
                case[contender] = "time"
                continue
            steps = WALK_STEPS if is_walk else STEPS
            try:
                case[contender] = per_token(decoder, steered, batch, context, steps)
            except Exception as error:
                case[contender] = words(error)
                synchronize(run.device)
        copy_rate = run.before("bandwidth").get("GB/s")
        if copy_rate and isinstance(case["steered"], float):
            case["of bandwidth"] = weight_bytes(base) / copy_rate / 1e6 / case["steered"]
        cases.append(case)
        run.keep(result)
    result["graphs"] = {k: (d.graphs, d.failures) for k, (d, _) in contenders.items()}
    return result


def section(run: Run) -> dict[str, Any]:
    """Check the step, then time it."""
    cases: list[dict[str, Any]] = []
    result: dict[str, Any] = {"checks": checks(run), "cases": cases, "models": []}
    run.keep(result, every=0)
    for i, name in enumerate(REAL if run.device == "cuda" else ()):
        end = time.time() + run.left() / (len(REAL) - i)
        try:
            result["models"].append(race(run, name, cases, end))
        except Exception as error:
            result["models"].append({"model": name, "error": words(error)})
        run.keep(result, every=0)
        gc.collect()
        torch.cuda.empty_cache()
    return result
