"""Measure how long a fresh process takes to its first steered token.

    pytest benchmarks/engine/test_start.py --benchmark-json=runs/start.json

The files are in the page cache. SmolLM2-135M comes from the GGUF of its package, or from
safetensors as most models do; with a LoRA on all linear layers.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.engine.contenders import TEXT, random_adapter, random_lora
from benchmarks.records import machine
from svd_engine import loading

PARTS = ("import", "load", "first token", "again")
ROUNDS = 5
PROCESS = """
import json, sys, time
marks = [time.perf_counter()]
import torch
from svd_engine import SteeredEngine, SteeringConfig
marks.append(time.perf_counter())
base, adapter, dtype, text = sys.argv[1:]
engine = SteeredEngine.from_pretrained(
    base, adapter, dtype=getattr(torch, dtype), steering=SteeringConfig(-4.0, 0.1)
)
for _ in range(3):
    marks.append(time.perf_counter())
    engine.generate([text], max_new_tokens=1)
print(json.dumps([b - a for a, b in zip(marks, marks[1:])]))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Map each dtype to a folder with the model in safetensors; and "adapter" to its own."""
    made: dict[str, Path] = {}
    for dtype in ("float32", "bfloat16"):
        base, tokenizer = loading.load_base(loading.SMOLLM2, dtype=getattr(torch, dtype))
        made[dtype] = tmp_path_factory.mktemp(dtype)
        base.save_pretrained(made[dtype])
        tokenizer.save_pretrained(made[dtype])
    made["adapter"] = tmp_path_factory.mktemp("adapter")
    random_adapter(base, random_lora()).save_pretrained(str(made["adapter"]))
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("base", ["GGUF", "safetensors"])
def test_start(
    benchmark: BenchmarkFixture, folders: dict[str, Path], base: str, dtype: str
) -> None:
    seconds: list[list[float]] = []

    def start() -> None:
        where = loading.SMOLLM2 if base == "GGUF" else folders[dtype]
        command = [sys.executable, "-c", PROCESS, where, folders["adapter"], dtype, TEXT]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(json.loads(ran.stdout))

    start()
    seconds.clear()
    benchmark.pedantic(start, rounds=ROUNDS)
    parts = dict(zip(PARTS, map(median, zip(*seconds, strict=True)), strict=True))
    benchmark.extra_info |= {"machine": machine(), "base": base, "dtype": dtype, "seconds": parts}
