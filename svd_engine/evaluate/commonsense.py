"""The eight commonsense tasks in the instruction format of LLM-Adapters.

Hu et al., LLM-Adapters: An Adapter Family for Parameter-Efficient Fine-Tuning of Large Language
Models, arXiv 2304.01933. An item has `instruction`, which ends with the line "Answer format:
answer1/answer2/...", `output`, "the correct answer is answer1", and `answer`, "answer1".
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from svd_engine.data.prompt_keys import prompt_key
from svd_engine.evaluate import metrics, sources

METRICS = ("accuracy",)
GENERATION_METRICS = ("accuracy", "answered")
# task -> its folder in LLM-Adapters
TASKS = {
    "boolq": "boolq", "piqa": "piqa", "siqa": "social_i_qa", "hellaswag": "hellaswag",
    "winogrande": "winogrande", "arc-easy": "ARC-Easy", "arc-challenge": "ARC-Challenge",
    "obqa": "openbookqa",
}  # fmt: skip
# Alpaca's template, which LLM-Adapters uses for training and testing.
TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{question}\n\n### Response:\n"
)
OUTPUT = "the correct answer is {}"
_FORMAT = re.compile(r"\nAnswer format: (\S+)\s*$")


@dataclass(frozen=True)
class Problem:
    """One instruction with its options."""

    where: str
    question: str  # the instruction
    options: list[str]  # the right one first

    @property
    def answers(self) -> list[str]:
        """The outputs to score, as they follow the prompt."""
        return [OUTPUT.format(option) for option in self.options]

    def metrics(self, scores: Sequence[float]) -> list[float]:
        """Accuracy by likelihood: the right output scores above every other."""
        return metrics.metrics(np.array(scores), [0], range(1, len(self.options)))[:1]

    def judged(self, text: str) -> list[float]:
        """Accuracy by the first option named in the text, and whether the text names one."""
        words = "|".join(re.escape(option) for option in self.options)
        # Letters may follow: a model that does not stop may go on without a space.
        named = re.search(rf"\b(?:{words})(?!\d)", text, re.IGNORECASE)
        right = named is not None and named[0].lower() == self.options[0].lower()
        return [float(right), float(named is not None)]


def find(data: str | Path, task: str, part: str) -> Path:
    """Return the file of a task: `data` itself, or `<part>.json` in its folder or the task's."""
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {task!r}.")
    data = Path(data)
    if data.is_file():
        return data
    for path in (data / TASKS[task] / f"{part}.json", data / f"{part}.json"):
        if path.is_file():
            return path
    raise ValueError(f"{data} holds neither {TASKS[task]}/{part}.json nor {part}.json.")


def read(path: str | Path) -> list[Problem]:
    """Read the problems of a file. Raises ValueError with the line."""
    problems = [_problem(where, item) for where, item in sources.read_json(Path(path))]
    if not problems:
        raise ValueError(f"{path} holds no problems.")
    return problems


def split(
    train: Sequence[Problem], test: Sequence[Problem], seed: int = 0, calibration: int = 500
) -> dict[str, list[Problem]]:
    """Shuffle the training file and keep its last problems for calibration.

    Duplicates and problems of the test are dropped.
    """
    known = {prompt_key(problem.question) for problem in test}
    shuffled = []
    for problem in train:
        key = prompt_key(problem.question)
        if key not in known:
            known.add(key)
            shuffled.append(problem)
    random.Random(seed).shuffle(shuffled)
    if not 1 <= calibration < len(shuffled):
        raise ValueError(
            f"calibration must lie in [1, {len(shuffled) - 1}], of {len(shuffled)} problems that "
            f"are not in the test; got {calibration}."
        )
    return {
        "training": shuffled[:-calibration],
        "calibration": shuffled[-calibration:],
        "test": list(test),
    }


def example(problem: Problem) -> dict[str, Any]:
    """Return a line for `svd-engine warm-start` and `svd-engine calibrate`."""
    right, *wrong = problem.answers
    prompt = TEMPLATE.format(question=problem.question)
    return {"prompt": prompt, "completion": right, "rejected": wrong}


def _problem(where: str, item: Any) -> Problem:
    if not isinstance(item, dict):
        raise ValueError(f"{where}: a problem is an object; got {type(item).__name__}.")
    for key in ("instruction", "output", "answer"):
        if key not in item:
            raise ValueError(f"{where}: {key!r} is missing; got {sorted(item)}.")
        sources.texts(where, key, [item[key]])
    if item.get("input"):
        raise ValueError(f"{where}: input must be empty in this format; got {item['input']!r}.")
    named = _FORMAT.search(item["instruction"])
    if named is None:
        raise ValueError(f"{where}: instruction must end with a line 'Answer format: a/b/...'.")
    options, answer = named[1].split("/"), item["answer"]
    sources.texts(where, "an option of the answer format", options)
    sources.distinct(where, options)
    if len(options) < 2:
        raise ValueError(f"{where}: the answer format must name two options at least.")
    if answer not in options:
        raise ValueError(f"{where}: the right answer {answer!r} is not among {options}.")
    if item["output"] != OUTPUT.format(answer):
        raise ValueError(
            f"{where}: output must be {OUTPUT.format(answer)!r}; got {item['output']!r}."
        )
    ordered = [answer, *(option for option in options if option != answer)]
    return Problem(where, item["instruction"], ordered)
