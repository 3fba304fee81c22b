"""`svd-engine evaluate split`: disjoint files for warm-start, calibrate and the test."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from svd_engine.cli.options import (
    CalibrationSize,
    Data,
    Hub,
    Problems,
    Prompt,
    SplitSeed,
    Task,
    questions,
)
from svd_engine.cli.terminal import say
from svd_engine.utils.files import write_text

app = typer.Typer(no_args_is_help=True, help="Write training, calibration and test files.")
Folder = Annotated[Path, typer.Argument(help="Folder for the three files of JSON lines.")]


@app.command("truthfulqa")
def truthfulqa_parts(
    output: Folder, data: Data = None, hub: Hub = False, prompt: Prompt = "plain",
    split_seed: SplitSeed = 0, calibration: CalibrationSize = 100,
) -> None:  # fmt: skip
    """Keep a fifth of the questions for the test, some for calibration, the rest for training."""
    from svd_engine.evaluate import truthfulqa

    template = truthfulqa.template(prompt)
    parts = truthfulqa.split(questions(data, hub), split_seed, calibration)
    _write(output, {k: [truthfulqa.example(q, template) for q in v] for k, v in parts.items()})


@app.command("commonsense")
def commonsense_parts(
    output: Folder, data: Problems, task: Task, split_seed: SplitSeed = 0,
    calibration: CalibrationSize = 500,
) -> None:  # fmt: skip
    """Move part of the training file to calibration; leave out problems of the test file."""
    from svd_engine.evaluate import commonsense as tasks

    train, test = (tasks.read(tasks.find(data, task, part)) for part in ("train", "test"))
    parts = tasks.split(train, test, split_seed, calibration)
    _write(output, {k: [tasks.example(p) for p in v] for k, v in parts.items()})


def _write(folder: Path, parts: dict[str, list[dict[str, Any]]]) -> None:
    for part, lines in parts.items():
        path = folder / f"{part}.jsonl"
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        say(f"{len(lines)} questions to {path}")
