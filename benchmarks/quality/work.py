"""Warm starts and passes of the quality experiments, made once and kept in runs/quality."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.quality.tasks import Part, Task
from benchmarks.records import ROOT
from svd_engine import loading
from svd_engine.calibration import support_stats
from svd_engine.calibration.support_stats import SupportStats
from svd_engine.engine import SteeredEngine
from svd_engine.model.pair import ModelPair
from svd_engine.training.warm_start import warm_start

RUNS = ROOT / "runs" / "quality"
DTYPE = "float32"  # in bfloat16 answers that differ by one token tie
ALPHA = 0.001  # of the supports kept, which contain those of every larger alpha


class Passes(NamedTuple):
    """The results of both models over all answers of a task, the supports at ALPHA."""

    calibration: SupportStats
    test: SupportStats


def adapter(task: Task, method: str, steps: int, seed: int = 0, **training: Any) -> Path:
    """Return the folder of a warm start of smollm2; train it if it is missing."""
    folder = RUNS / task.name / f"{method}-{steps}-{seed}"
    if not folder.is_dir():
        base, tokenizer = loading.load_base(loading.SMOLLM2, dtype=DTYPE, device=task.device)
        training |= {"method": method, "steps": steps, "seed": seed, "learning_rate": "auto"}
        warm_start(base, tokenizer, task.training, folder, **training)
    return folder


def passes(task: Task, folder: Path) -> Passes:
    """Return the passes over the calibration and over the test part, made if missing."""
    parts = {"calibration": task.calibration, "test": task.test}
    missing = [name for name in parts if not (folder / f"{name}.pt").is_file()]
    if missing:
        pair = load(task, folder).pair
        for name in missing:
            make(pair, parts[name], folder / f"{name}.pt", f"{folder.name}, {name}")
    return Passes(*(read(folder / f"{name}.pt") for name in parts))


def load(task: Task, folder: Path) -> SteeredEngine:
    return SteeredEngine.from_pretrained(
        loading.SMOLLM2, folder, dtype=DTYPE, device=task.device, probe=False
    )


def make(pair: ModelPair, part: Part, path: Path, words: str) -> None:
    """Run both models over the answers and write the supports to `path`."""
    stats = support_stats.collect(pair, part.answers.passages, ALPHA, words)
    kept = {field.name: _narrow(getattr(stats, field.name)) for field in fields(stats)}
    partial = path.with_suffix(".partial")
    torch.save(kept, partial)
    os.replace(partial, path)


def read(path: Path) -> SupportStats:
    return SupportStats(**{name: _wide(values) for name, values in torch.load(path).items()})


def _narrow(values: Tensor) -> Tensor:
    """Narrow for the file: these floats were float32, and no index exceeds 2**31."""
    kinds = {torch.float64: torch.float32, torch.int64: torch.int32}
    return values.to(kinds.get(values.dtype, values.dtype))


def _wide(values: Tensor) -> Tensor:
    kinds = {torch.float32: torch.float64, torch.int32: torch.int64}
    return values.to(kinds.get(values.dtype, values.dtype))
