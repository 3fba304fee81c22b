"""The experiments, one function per command; each takes the folder of the data sets."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import measure, work
from benchmarks.quality.ablations import alphas, calibrated, variants
from benchmarks.quality.choices import judged
from benchmarks.quality.cost import commands, overhead
from benchmarks.quality.decoding import strategies
from benchmarks.quality.measure import Table, summary
from benchmarks.quality.tasks import FOLDS, Task, commonsense_split, truthfulqa_fold
from benchmarks.quality.work import Passes

METHODS = ("lora", "ia3", "prompt", "prefix")
STEPS, STEPS_TRIED = 30, (10, 30, 80)
COMMONSENSE = ("obqa", "boolq", "arc-easy")
COMMONSENSE_TRAINING = {"steps": 20, "batch_size": 8}


def truthfulqa(data: Path) -> dict[str, Any]:
    """Measure Table 1: four methods, every question in the test once, every way to choose."""
    cases: list[dict[str, Any]] = []
    gains: list[Table] = []
    for fold in range(FOLDS):
        task = truthfulqa_fold(data, fold)
        for method, passes, _ in made(task, STEPS):
            report = measure.calibrated(task, passes)
            case, models = measure.worth(task, passes, report)
            gains.append(models["steered"] - models["adapted"])
            case |= {
                "choices": judged(task, passes, report),
                "nll": measure.likelihood(task, passes),
            }
            if fold == 0:
                case |= measure.estimators(task, passes, calibrated(task, passes))
            cases.append({"fold": fold, "method": method} | case)
    changes = [np.array([each.pop("changes") for each in case["choices"]]).T for case in cases]
    names = [each["name"] for each in cases[0]["choices"]]
    return {
        "mean_gain": summary(task.columns, pooled(gains)),
        "choice_gain": summary(names, pooled(changes)),
        "cases": cases,
    }


def made(task: Task, steps: int, **training: Any) -> Iterator[tuple[str, Passes, Path]]:
    """Yield each method with its passes and the folder of its warm start."""
    for method in METHODS:
        folder = work.adapter(task, method, steps, **training)
        yield method, work.passes(task, folder), folder
    work.forget_base(task)


def pooled(gains: Sequence[Table]) -> Table:
    """Average the methods of each fold and concatenate the folds, `[questions, columns]`.

    Methods share the questions of a fold, so they are averaged before any resampling.
    """
    folds = [gains[start : start + len(METHODS)] for start in range(0, len(gains), len(METHODS))]
    return np.concatenate([np.mean(fold, axis=0) for fold in folds])


def commonsense(data: Path) -> dict[str, Any]:
    """Measure Table 2: four methods, accuracy by likelihood."""
    cases = []
    for name in COMMONSENSE:
        task = commonsense_split(data, name)
        for method, passes, _ in made(task, **COMMONSENSE_TRAINING):
            report = measure.calibrated(task, passes)
            case, _ = measure.worth(task, passes, report)
            cases.append({"task": name, "method": method} | COMMONSENSE_TRAINING | case)
    return {"cases": cases}


def ablations(data: Path) -> dict[str, Any]:
    """Measure Figure 2 and Table 3: without the projection, without the mask."""
    return over_methods(data, variants)


def alpha(data: Path) -> dict[str, Any]:
    """Measure Figure 4: every alpha at its own strength."""
    return over_methods(data, alphas)


def over_methods(
    data: Path, measure: Callable[[Task, Passes, Path], list[dict[str, Any]]]
) -> dict[str, Any]:
    task = truthfulqa_fold(data, 0)
    return {
        "cases": [
            {"method": method} | case
            for method, passes, folder in made(task, STEPS)
            for case in measure(task, passes, folder)
        ]
    }


def steps(data: Path) -> dict[str, Any]:
    """Measure Figure 3: LoRA after warm starts of several lengths."""
    task = truthfulqa_fold(data, 0)
    cases = []
    for count in STEPS_TRIED:
        passes = work.passes(task, work.adapter(task, "lora", count))
        case, _ = measure.worth(task, passes, measure.calibrated(task, passes))
        cases.append({"steps": count} | case)
    work.forget_base(task)
    return {"cases": cases}


def decoding(data: Path) -> dict[str, Any]:
    """Measure Table 5: greedy, beams, top-p and top-k; accuracy by generation."""
    task = commonsense_split(data, COMMONSENSE[0])
    folder = work.adapter(task, "lora", **COMMONSENSE_TRAINING)
    report = measure.calibrated(task, work.passes(task, folder))
    return {"cases": strategies(task, folder, report)}


def cost(data: Path) -> dict[str, Any]:
    """Measure CPU seconds and peak memory of calibration and evaluation."""
    task = truthfulqa_fold(data, 0)
    folder = work.adapter(task, "lora", STEPS)
    return {
        "cases": commands(data, folder),
        "overhead": overhead(folder, task.calibration.rows),
    }
