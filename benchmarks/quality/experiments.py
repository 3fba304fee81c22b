"""The paper's experiments at the size of one CPU: python -m benchmarks.quality truthfulqa

One command a table; each writes benchmarks/results/quality_<command>.json. Warm starts and passes
are kept in runs/quality, so a killed command, started again, does what is missing.
"""

import argparse
import platform
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import svd_engine
from benchmarks import (
    quality_ablations,
    quality_cost,
    quality_decoding,
    quality_measure,
    quality_objectives,
    quality_plots,
)
from benchmarks.quality_measure import Table, summary
from benchmarks.quality_tasks import DATA, Task, commonsense_split, truthfulqa_split
from benchmarks.quality_work import Pass, adapter, passes
from benchmarks.run import to_json
from benchmarks.test_operators import machine
from svd_engine.files import write_text

RESULTS = Path(__file__).parent / "results"
METHODS = ("lora", "ia3", "prompt", "prefix")
STEPS, STEPS_TRIED = 30, (10, 30, 80)
SEEDS = (0, 1, 2, 3)
COMMONSENSE, COMMONSENSE_TRAINING = ("obqa", "boolq", "arc-easy"), dict(steps=20, batch_size=8)


def made(task: Task, method: str, steps: int = STEPS, **training: Any) -> tuple[Pass, Pass]:
    return passes(task, adapter(task, method, steps, **training))


def truthfulqa(data: Path) -> dict[str, Any]:
    """Table 1: four methods, calibrated on ranking; every objective and estimator beside it."""
    cases, gains = [], []
    for seed in SEEDS:
        task = truthfulqa_split(data, seed)
        for method in METHODS:
            found = made(task, method)
            case, models = quality_measure.worth(task, *found)
            gains.append(models["steered"] - models["adapted"])
            likelihood = quality_measure.likelihood(task, *found)
            case |= {"objectives": quality_objectives.objectives(task, *found), "nll": likelihood}
            cases.append({"seed": seed, "method": method} | case)
    changes = [[each.pop("changes") for each in case["objectives"]] for case in cases]
    names = tuple(each["objective"] for each in cases[0]["objectives"])
    return {
        "mean_gain": summary(task.columns, pooled(gains)),
        "objective_gain": summary(names, pooled(np.array(changes).transpose(0, 2, 1))),
        "cases": cases,
    }


def pooled(gains: Sequence[Table]) -> Table:
    """Tables of questions by columns, the methods of a split averaged, the splits in a row.

    Methods share the questions of a split, so they are averaged before any resampling.
    """
    table = np.array(gains).reshape(len(SEEDS), len(METHODS), *np.shape(gains[0]))
    return np.concatenate(table.mean(1))


def commonsense(data: Path) -> dict[str, Any]:
    """Table 2: four methods, accuracy by likelihood."""
    cases = []
    for name in COMMONSENSE:
        task = commonsense_split(data, name)
        for method in METHODS:
            case, _ = quality_measure.worth(task, *made(task, method, **COMMONSENSE_TRAINING))
            cases.append({"task": name, "method": method} | COMMONSENSE_TRAINING | case)
    return {"cases": cases}


def ablations(data: Path) -> dict[str, Any]:
    """Figure 2 and Table 3: without the projection, without the mask."""
    return over_methods(data, quality_ablations.ablations)


def alpha(data: Path) -> dict[str, Any]:
    """Figure 4: every alpha at its own strength."""
    return over_methods(data, quality_ablations.sweep)


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
    """Figure 3: LoRA after warm starts of several lengths."""
    task = truthfulqa_split(data, SEEDS[0])
    cases = []
    for count in STEPS_TRIED:
        case, _ = quality_measure.worth(task, *made(task, "lora", count))
        cases.append({"steps": count} | case)
    return {"cases": cases}


def decoding(data: Path) -> dict[str, Any]:
    """Table 5: greedy, beams, top-p and top-k; accuracy by generation."""
    task = commonsense_split(data, COMMONSENSE[0])
    folder = adapter(task, "lora", **COMMONSENSE_TRAINING)
    report = quality_measure.calibrated(task, passes(task, folder)[0])
    return {"cases": quality_decoding.decoding(task, folder, report)}


def cost(data: Path) -> dict[str, Any]:
    """CPU seconds and peak memory of calibration and evaluation."""
    task = truthfulqa_split(data, SEEDS[0])
    folder = adapter(task, "lora", STEPS)
    return {
        "cases": quality_cost.cost(data, folder),
        "overhead": quality_cost.overhead(folder, task.calibration.rows),
    }


COMMANDS = (truthfulqa, commonsense, ablations, alpha, steps, decoding, cost)


def about(command: str) -> dict[str, Any]:
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {
        "command": f"python -m benchmarks.quality {command}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": machine(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions | {"svd-engine": svd_engine.__version__},
        "model": "SmolLM2-135M-Instruct",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = {command.__name__: command for command in COMMANDS}
    parser.add_argument("command", choices=[*names, "plots"])
    parser.add_argument("--data", type=Path, default=DATA, help="truthfulqa/ and commonsense/")
    arguments = parser.parse_args()
    if arguments.command != "plots":
        result = about(arguments.command) | names[arguments.command](arguments.data)
        path = RESULTS / f"quality_{arguments.command}.json"
        write_text(path, to_json(result))
        print(f"{path} is written")
    quality_plots.draw(RESULTS)


if __name__ == "__main__":
    main()
