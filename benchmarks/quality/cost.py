"""CPU seconds and peak memory of the commands that calibrate and evaluate, one process each; and
what calibration adds to the forward passes that it needs."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.quality.tasks import Rows, tokenizer, truthfulqa_fold
from benchmarks.quality.work import DTYPE
from svd_engine import loading
from svd_engine.calibration.calibrate import calibrate
from svd_engine.calibration.objectives import Answers
from svd_engine.calibration.options import CalibrationOptions
from svd_engine.data.examples import encode
from svd_engine.engine import SteeredEngine
from svd_engine.generation import scoring
from svd_engine.utils.files import write_text

QUESTIONS = 100
TOKENS, ROUNDS = 1000, 5  # of `overhead`: answer tokens and timed rounds
LOAD = "import svd_engine as s, sys; s.SteeredEngine.from_pretrained('smollm2', sys.argv[1])"


def commands(data: Path, adapter: Path) -> list[dict[str, Any]]:
    """Measure loading alone, `svd-engine calibrate` and `svd-engine evaluate truthfulqa`."""
    task = truthfulqa_fold(data, 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in adapter.iterdir():
            if path.suffix in (".json", ".safetensors"):
                shutil.copy(path, folder)
        rows = task.calibration.rows[:QUESTIONS]
        write_text(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        command = [sys.executable, "-m", "svd_engine.cli.main"]
        calibrating = [*command, "calibrate", name, f"{name}/rows.jsonl"]
        evaluating = [*command, "evaluate", "truthfulqa", "--adapter", name]
        evaluating += ["--limit", str(QUESTIONS), "--output", f"{name}/runs"]
        evaluating += ["--data", str(data / "truthfulqa" / "mc_task.json")]
        runs = {
            "load both models": [sys.executable, "-c", LOAD, name],
            f"calibrate, {QUESTIONS} questions": calibrating,
            f"evaluate truthfulqa, {QUESTIONS} questions": evaluating,
        }
        return [{"what": what} | measured(arguments) for what, arguments in runs.items()]


def overhead(adapter: Path, rows: Rows) -> dict[str, float]:
    """Time the forward passes over `TOKENS` answer tokens, and calibration including them."""
    engine = SteeredEngine.from_pretrained(loading.SMOLLM2, adapter, dtype=DTYPE)
    examples = encode(rows, tokenizer())
    tokens = np.cumsum([sum(map(len, (e.completion, *e.accepted, *e.rejected))) for e in examples])
    examples = examples[: int(np.searchsorted(tokens, TOKENS)) + 1]
    answers = Answers(examples)
    options = CalibrationOptions.checked(answers.wrong)

    def forward() -> None:
        for _ in scoring.predictions(engine.pair, answers.passages):
            pass

    def timed(work: Callable[[], Any]) -> float:
        start = perf_counter()
        work()
        return perf_counter() - start

    works = forward, lambda: calibrate(engine.pair, answers, options)
    seconds = np.array([[timed(work) for work in works] for _ in range(ROUNDS + 1)])[1:]
    return {
        "tokens": int(tokens[len(examples) - 1]),
        "forward": float(np.median(seconds[:, 0])),
        "calibrate": float(np.median(seconds[:, 1])),
        "ratio": float(np.median(seconds[:, 1] / seconds[:, 0])),
    }


def measured(arguments: list[str]) -> dict[str, float]:
    """Run a command and return its CPU seconds and its peak memory."""
    process = subprocess.Popen(arguments)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    # ru_maxrss is in kilobytes on Linux.
    return {"seconds": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss * 1024}
