"""The experiments, one function per command."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

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
SEEDS = (0,)  # of the warm starts
STEPS, STEPS_TRIED = 30, (10, 30, 80)
COMMONSENSE = ("obqa", "boolq", "arc-easy")
COMMONSENSE_TRAINING = {"steps": 20, "batch_size": 8}
Case = dict[str, Any]


class Place(NamedTuple):
    """Where an experiment finds its data and where it runs."""

    data: Path
    device: str
    jobs: int  # processes at the same time


def each(place: Place, measured: Callable[[Place, Any], Any], parts: Sequence[Any]) -> list[Any]:
    """Measure the parts of an experiment, `place.jobs` at a time."""
    places = [place] * len(parts)
    if place.jobs == 1:
        return list(map(measured, places, parts))
    with ProcessPoolExecutor(place.jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(measured, places, parts))


def truthfulqa(place: Place) -> Case:
    """Measure Table 1: four methods, every question in the test once, every way to choose."""
    parts = [(fold, seed) for seed in SEEDS for fold in range(FOLDS)]
    cases, gains = map(list, zip(*each(place, fold_of_truthfulqa, parts), strict=True))
    return summarised(list(chain.from_iterable(cases)), parts, gains)


def fold_of_truthfulqa(place: Place, part: tuple[int, int]) -> tuple[list[Case], list[Table]]:
    """Measure every method on one fold, with one seed: cases, and gains of every question."""
    fold, seed = part
    task = truthfulqa_fold(place.data, fold, place.device)
    cases, gains = [], []
    for method, passes, _ in made(task, STEPS, seed=seed):
        report = measure.calibrated(task, passes)
        case, models = measure.worth(task, passes, report)
        gains.append(models["steered"] - models["adapted"])
        case |= {"choices": judged(task, passes, report), "nll": measure.likelihood(task, passes)}
        if part == (0, 0):
            case |= measure.estimators(task, passes, calibrated(task, passes))
        cases.append({"fold": fold, "seed": seed, "method": method} | case)
    return cases, gains


def summarised(
    cases: list[Case], parts: Sequence[tuple[int, int]], gains: Sequence[Sequence[Table]]
) -> Case:
    """Pool the questions of all folds: by method, over all methods, and by way to choose.

    gains: of each part, by method. The cases lose their "changes".
    """
    columns = list(cases[0]["gain"])
    names = [choice["name"] for choice in cases[0]["choices"]]
    folds = [fold for fold, _ in parts]
    changes = [np.array([c.pop("changes") for c in case["choices"]]).T for case in cases]
    count = len(cases) // len(parts)
    by_part = [changes[start : start + count] for start in range(0, len(cases), count)]
    methods = [case["method"] for case in cases[:count]]
    return {
        "mean_gain": summary(columns, pooled(folds, gains)),
        "method_gain": {
            method: summary(columns, pooled(folds, [[found[i]] for found in gains]))
            for i, method in enumerate(methods)
        },
        "choice_gain": summary(names, pooled(folds, by_part)),
        "cases": cases,
    }


def pooled(folds: Sequence[int], tables: Sequence[Sequence[Table]]) -> Table:
    """Average whatever has the questions of a fold, then concatenate the folds.

    The result is `[questions, columns]`: methods and seeds share the questions of a fold, so they
    are averaged before any resampling.
    """
    shared: dict[int, list[Table]] = {}
    for fold, found in zip(folds, tables, strict=True):
        shared.setdefault(fold, []).extend(found)
    return np.concatenate([np.mean(found, axis=0) for _, found in sorted(shared.items())])


def made(task: Task, steps: int, **training: Any) -> Iterator[tuple[str, Passes, Path]]:
    """Yield each method with its passes and the folder of its warm start."""
    for method in METHODS:
        folder = work.adapter(task, method, steps, **training)
        yield method, work.passes(task, folder), folder


def commonsense(place: Place) -> Case:
    """Measure Table 2: four methods, accuracy by likelihood."""
    return {"cases": list(chain.from_iterable(each(place, commonsense_task, COMMONSENSE)))}


def commonsense_task(place: Place, name: str) -> list[Case]:
    task = commonsense_split(place.data, name, place.device)
    cases = []
    for method, passes, _ in made(task, **COMMONSENSE_TRAINING):
        report = measure.calibrated(task, passes)
        case, _ = measure.worth(task, passes, report)
        cases.append({"task": name, "method": method} | COMMONSENSE_TRAINING | case)
    return cases


def ablations(place: Place) -> Case:
    """Measure Figure 2 and Table 3: without the projection, without the mask."""
    return over_methods(place, variants)


def alpha(place: Place) -> Case:
    """Measure Figure 4: every alpha at its own strength."""
    return over_methods(place, alphas)


def over_methods(place: Place, measure: Callable[[Task, Passes, Path], list[Case]]) -> Case:
    task = truthfulqa_fold(place.data, 0, place.device)
    return {
        "cases": [
            {"method": method} | case
            for method, passes, folder in made(task, STEPS)
            for case in measure(task, passes, folder)
        ]
    }


def steps(place: Place) -> Case:
    """Measure Figure 3: LoRA after warm starts of several lengths."""
    task = truthfulqa_fold(place.data, 0, place.device)
    cases = []
    for count in STEPS_TRIED:
        passes = work.passes(task, work.adapter(task, "lora", count))
        case, _ = measure.worth(task, passes, measure.calibrated(task, passes))
        cases.append({"steps": count} | case)
    return {"cases": cases}


def decoding(place: Place) -> Case:
    """Measure Table 5: greedy, beams, top-p and top-k; accuracy by generation."""
    task = commonsense_split(place.data, COMMONSENSE[0], place.device)
    folder = work.adapter(task, "lora", **COMMONSENSE_TRAINING)
    report = measure.calibrated(task, work.passes(task, folder))
    return {"cases": strategies(task, folder, report)}


def cost(place: Place) -> Case:
    """Measure CPU seconds and peak memory of calibration and evaluation."""
    task = truthfulqa_fold(place.data, 0)
    folder = work.adapter(task, "lora", STEPS)
    return {
        "cases": commands(place.data, folder),
        "overhead": overhead(folder, task.calibration.rows),
    }
