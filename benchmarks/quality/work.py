"""Warm starts and passes of the quality experiments, made once and kept in runs/quality."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.tasks import Part, Task
from benchmarks.records import ROOT
from svd_engine import loading
from svd_engine.calibration import support_stats
from svd_engine.engine import SteeredEngine
from svd_engine.generation import scoring
from svd_engine.training.warm_start import warm_start

RUNS = ROOT / "runs" / "quality"
BLOCK = 8  # rows of logits processed at once, so that the intermediates stay in the cache
ALPHA = 0.001  # of the supports kept, which contain those of every larger alpha
# The strengths of `raw` and `whole`, which need the whole vocabulary.
RAW = (-8.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)
WHOLE = (-64.0, -48.0, -32.0, -24.0, -16.0, -12.0, -8.0, -4.0, -2.0, 0.0, 2.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True)
class Pass:
    """The results of one pass of both models over all answers of some questions."""

    entries: support_stats.SupportStats  # at ALPHA
    raw: Tensor  # log P of each answer under z + mu g, the gradient itself, [answers, RAW]
    whole: Tensor  # log P of each answer under z + mu delta, no mask, [answers, WHOLE]


def adapter(task: Task, method: str, steps: int, **training: Any) -> Path:
    """Return the folder of a warm start of smollm2 in bfloat16; train it if it is missing."""
    folder = RUNS / task.name / f"{method}-{steps}"
    if not folder.is_dir():
        base, tokenizer = loading.load_base(loading.SMOLLM2, dtype="bfloat16")
        training |= {"method": method, "steps": steps, "learning_rate": "auto"}
        warm_start(base, tokenizer, task.training, folder, **training)
    return folder


def passes(task: Task, folder: Path) -> tuple[Pass, Pass]:
    """Return the passes over the calibration and over the test part, made if missing."""
    parts = {"calibration": task.calibration, "test": task.test}
    missing = [name for name in parts if not (folder / f"{name}.pt").is_file()]
    if missing:
        engine = SteeredEngine.from_pretrained(loading.SMOLLM2, folder, dtype=task.dtype)
        for name in missing:
            _make(engine, parts[name], folder / f"{name}.pt", f"{folder.name}, {name}")
    calibration, test = (_read(folder / f"{name}.pt") for name in parts)
    return calibration, test


def _make(engine: SteeredEngine, part: Part, path: Path, words: str) -> None:
    passages = part.answers.passages
    raw = torch.zeros(len(passages), len(RAW), dtype=torch.float64)
    whole = torch.zeros(len(passages), len(WHOLE), dtype=torch.float64)

    def seen() -> Iterator[scoring.Predictions]:
        for predicted in scoring.predictions(engine.pair, passages, words):
            _add(raw, whole, *predicted)
            yield predicted

    entries = support_stats.gather(seen(), ALPHA)
    kept = {field.name: _narrow(getattr(entries, field.name)) for field in fields(entries)}
    partial = path.with_suffix(".partial")
    torch.save({"entries": kept, "raw": raw, "whole": whole}, partial)
    os.replace(partial, path)


def _read(path: Path) -> Pass:
    found = torch.load(path)
    entries = {name: _wide(values) for name, values in found["entries"].items()}
    return Pass(support_stats.SupportStats(**entries), found["raw"], found["whole"])


@torch.inference_mode()
def _add(
    raw: Tensor, whole: Tensor, logits: Sequence[Tensor], target: Tensor, passage: Tensor
) -> None:
    """Add log P of these tokens to their passages, for every strength of RAW and WHOLE.

    The gradient is g = -(log p - log q + 1), so z + mu g is (1 - mu) z + mu b up to a constant.
    """
    for rows in torch.arange(len(target)).split(BLOCK):
        z, b, y = logits[0][rows].float(), logits[-1][rows].float(), target[rows, None]
        d = z - b
        p = z.softmax(-1)
        delta = p * (torch.linalg.vecdot(p, d)[:, None] - d)
        for table, strengths, direction in ((raw, RAW, -d), (whole, WHOLE, delta)):
            for column, mu in enumerate(strengths):
                steered = torch.add(z, direction, alpha=mu)
                logp = steered.gather(-1, y)[:, 0] - steered.logsumexp(-1)
                table[:, column].index_add_(0, passage[rows], logp.double())


def _narrow(values: Tensor) -> Tensor:
    """Narrow for the file: these floats were float32, and no index exceeds 2**31."""
    kinds = {torch.float64: torch.float32, torch.int64: torch.int32}
    return values.to(kinds.get(values.dtype, values.dtype))


def _wide(values: Tensor) -> Tensor:
    kinds = {torch.float32: torch.float64, torch.int32: torch.int64}
    return values.to(kinds.get(values.dtype, values.dtype))
