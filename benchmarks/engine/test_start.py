"""How long does a fresh process take to its first steered token?

    pytest benchmarks/test_start.py --benchmark-json=runs/start.json

The files are in the page cache. SmolLM2-135M comes from the GGUF of its package, or from
safetensors as most models do; with a LoRA on all linear layers.
"""

import json
import subprocess
import sys
from statistics import median

import pytest
import torch
from test_engine import ADAPTERS, TEXT, machine, pytestmark, random_adapter

from svd_engine import models

__all__ = ["pytestmark"]
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
def folders(tmp_path_factory):
    """dtype -> a folder with the model in safetensors; and "adapter"."""
    made = {}
    for dtype in ("float32", "bfloat16"):
        base, tokenizer = models.load_base(models.SMOLLM2, dtype=getattr(torch, dtype))
        made[dtype] = tmp_path_factory.mktemp(dtype)
        base.save_pretrained(made[dtype])
        tokenizer.save_pretrained(made[dtype])
    made["adapter"] = tmp_path_factory.mktemp("adapter")
    random_adapter(base, ADAPTERS["LoRA"]).save_pretrained(made["adapter"])
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("base", ["GGUF", "safetensors"])
def test_start(benchmark, folders, base, dtype):
    seconds = []

    def start():
        where = models.SMOLLM2 if base == "GGUF" else folders[dtype]
        command = [sys.executable, "-c", PROCESS, where, folders["adapter"], dtype, TEXT]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(json.loads(ran.stdout))

    start()
    seconds.clear()
    benchmark.pedantic(start, rounds=ROUNDS)
    parts = dict(zip(PARTS, map(median, zip(*seconds, strict=True)), strict=True))
    benchmark.extra_info |= {"machine": machine(), "base": base, "dtype": dtype, "seconds": parts}
