"""The tasks of the quality experiments, each split into training, calibration and test."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from svd_engine import loading
from svd_engine.calibration.objectives import Answers
from svd_engine.data.examples import encode
from svd_engine.evaluate import commonsense, truthfulqa, truthfulqa_files

FOLDS = 5  # of TruthfulQA; each question is in the test of one
TRUTHFULQA_CALIBRATION = 250  # questions; a warm start of 30 steps uses a third of the rest
COMMONSENSE_CALIBRATION, COMMONSENSE_TEST = 100, 200  # problems
Rows = list[dict[str, Any]]


class Item(Protocol):
    """A question with its answers, the right ones first, and its metrics in [0, 1]."""

    @property
    def answers(self) -> list[str]: ...
    def metrics(self, scores: Sequence[float]) -> list[float]: ...


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return loading.load_base(loading.SMOLLM2)[1]


class Part:
    """Questions, and all their answers as passages in the order of each item's `answers`."""

    def __init__(self, items: Sequence[Item], rows: Rows) -> None:
        self.items, self.rows = items, rows
        self.answers = Answers(encode(rows, tokenizer()))

    def figures(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the metrics of every question in per cent, their average last.

        scores: log P of every passage. The result is `[questions, columns]`.
        """
        found, start = [], 0
        for item in self.items:
            end = start + len(item.answers)
            metrics = item.metrics(scores[start:end].tolist())
            found.append([*metrics, float(np.mean(metrics))] if len(metrics) > 1 else metrics)
            start = end
        assert start == len(scores)
        return 100 * np.array(found)


@dataclass(frozen=True)
class Task:
    """One split of a benchmark; `columns` names the figures, and the last one counts."""

    name: str
    columns: tuple[str, ...]
    training: Rows
    calibration: Part
    test: Part
    device: str = "cpu"


def truthfulqa_fold(data: Path, fold: int, device: str = "cpu") -> Task:
    """Take a fifth of TruthfulQA as the test; 250 of the others calibrate, the rest train."""
    questions = truthfulqa_files.read(data / "truthfulqa" / "mc_task.json")
    random.Random(0).shuffle(questions)
    size = -(-len(questions) // FOLDS)
    start, end = fold * size, (fold + 1) * size
    others = questions[end:] + questions[:start]
    parts = {
        "training": others[:-TRUTHFULQA_CALIBRATION],
        "calibration": others[-TRUTHFULQA_CALIBRATION:],
        "test": questions[start:end],
    }
    rows = {k: [truthfulqa.example(q, truthfulqa.PLAIN) for q in v] for k, v in parts.items()}
    calibration, test = (Part(parts[k], rows[k]) for k in ("calibration", "test"))
    columns = (*truthfulqa.METRICS, "average")
    return Task(f"truthfulqa-{fold}", columns, rows["training"], calibration, test, device)


def commonsense_split(data: Path, name: str, device: str = "cpu") -> Task:
    """Split a task of LLM-Adapters: problems of its training file, and the first of its test."""
    training, testing = (
        commonsense.read(commonsense.find(data / "commonsense", name, part))
        for part in ("train", "test")
    )
    parts = commonsense.split(training, testing, calibration=COMMONSENSE_CALIBRATION)
    parts["test"] = parts["test"][:COMMONSENSE_TEST]
    rows = {k: [commonsense.example(p) for p in v] for k, v in parts.items()}
    calibration, test = (Part(parts[k], rows[k]) for k in ("calibration", "test"))
    return Task(name, commonsense.METRICS, rows["training"], calibration, test, device)
