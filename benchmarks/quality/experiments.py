"""The experiments, one function per command; each takes the folder of the data sets."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import measure
from benchmarks.quality.ablations import alphas, variants
from benchmarks.quality.cost import commands, overhead
from benchmarks.quality.decoding import strategies
from benchmarks.quality.measure import Table, summary
from benchmarks.quality.objectives import compared
from benchmarks.quality.tasks import Task, commonsense_split, truthfulqa_split
from benchmarks.quality.work import Pass, adapter, passes

METHODS = ("lora", "ia3", "prompt", "prefix")
STEPS, STEPS_TRIED = 30, (10, 30, 80)
SEEDS = (0, 1, 2, 3)
COMMONSENSE = ("obqa", "boolq", "arc-easy")
COMMONSENSE_TRAINING = {"steps": 20, "batch_size": 8}


def made(task: Task, method: str, steps: int = STEPS, **training: Any) -> tuple[Pass, Pass]:
    """Return the passes of a warm start over the calibration part and over the test part."""
    return passes(task, adapter(task, method, steps, **training))


def truthfulqa(data: Path) -> dict[str, Any]:
    """Measure Table 1: four methods calibrated on ranking, every objective, every estimator."""
    cases: list[dict[str, Any]] = []
    gains: list[Table] = []
    for seed in SEEDS:
        task = truthfulqa_split(data, seed)
        for method in METHODS:
            found = made(task, method)
            case, models = measure.worth(task, *found)
            gains.append(models["steered"] - models["adapted"])
            likelihood = measure.likelihood(task, *found)
            case |= {"objectives": compared(task, *found), "nll": likelihood}
            cases.append({"seed": seed, "method": method} | case)
    changes = [[each.pop("changes") for each in case["objectives"]] for case in cases]
    names = tuple(each["objective"] for each in cases[0]["objectives"])
    return {
        "mean_gain": summary(task.columns, pooled(gains)),
        "objective_gain": summary(names, pooled(list(np.array(changes).transpose(0, 2, 1)))),
        "cases": cases,
    }


def pooled(gains: Sequence[Table]) -> Table:
    """Average the methods of each split and concatenate the splits, `[questions, columns]`.

    Methods share the questions of a split, so they are averaged before any resampling.
    """
    table = np.array(gains).reshape(len(SEEDS), len(METHODS), *np.shape(gains[0]))
    return np.concatenate(table.mean(1))


def commonsense(data: Path) -> dict[str, Any]:
    """Measure Table 2: four methods, accuracy by likelihood."""
    cases = []
    for name in COMMONSENSE:
        task = commonsense_split(data, name)
        for method in METHODS:
            case, _ = measure.worth(task, *made(task, method, **COMMONSENSE_TRAINING))
            cases.append({"task": name, "method": method} | COMMONSENSE_TRAINING | case)
    return {"cases": cases}


def ablations(data: Path) -> dict[str, Any]:
    """Measure Figure 2 and Table 3: without the projection, without the mask."""
    return over_methods(data, variants)


def alpha(data: Path) -> dict[str, Any]:
    """Measure Figure 4: every alpha at its own strength."""
    return over_methods(data, alphas)


def over_methods(
    data: Path, measure: Callable[[Task, Pass, Pass], list[dict[str, Any]]]
) -> dict[str, Any]:
    task = truthfulqa_split(data, SEEDS[0])
    return {
        "cases": [
            {"method": method} | case
            for method in METHODS
            for case in measure(task, *made(task, method))
        ]
    }


def steps(data: Path) -> dict[str, Any]:
    """Measure Figure 3: LoRA after warm starts of several lengths."""
    task = truthfulqa_split(data, SEEDS[0])
    cases = []
    for count in STEPS_TRIED:
        case, _ = measure.worth(task, *made(task, "lora", count))
        cases.append({"steps": count} | case)
    return {"cases": cases}


def decoding(data: Path) -> dict[str, Any]:
    """Measure Table 5: greedy, beams, top-p and top-k; accuracy by generation."""
    task = commonsense_split(data, COMMONSENSE[0])
    folder = adapter(task, "lora", **COMMONSENSE_TRAINING)
    report = measure.calibrated(task, passes(task, folder)[0])
    return {"cases": strategies(task, folder, report)}


def cost(data: Path) -> dict[str, Any]:
    """Measure CPU seconds and peak memory of calibration and evaluation."""
    task = truthfulqa_split(data, SEEDS[0])
    folder = adapter(task, "lora", STEPS)
    return {
        "cases": commands(data, folder),
        "overhead": overhead(folder, task.calibration.rows),
    }
