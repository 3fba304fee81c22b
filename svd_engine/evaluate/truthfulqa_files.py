"""Readers of TruthfulQA from `mc_task.json`, `TruthfulQA.csv` or the Hub; they check questions."""

from pathlib import Path
from typing import Any

from svd_engine.evaluate import sources
from svd_engine.evaluate.truthfulqa import Question

HUB = "truthfulqa/truthful_qa"


def read(path: str | Path) -> list[Question]:
    """Read `mc_task.json` or `TruthfulQA.csv`. Raises ValueError with the line."""
    path = Path(path)
    if path.suffix == ".csv":
        questions = [_from_csv(where, row) for where, row in sources.read_csv(path)]
    else:
        questions = [_from_targets(where, item) for where, item in sources.read_json(path)]
    if not questions:
        raise ValueError(f"{path} holds no questions.")
    return questions


def read_hub() -> list[Question]:
    """Load the questions from the Hub; needs the network and the package `datasets`."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError("--hub needs its package: pip install datasets.") from error
    rows = load_dataset(HUB, "multiple_choice", split="validation")
    return [
        _from_targets(
            f"{HUB}:{number}",
            {
                "question": row["question"],
                **{
                    key: dict(zip(row[key]["choices"], row[key]["labels"], strict=True))
                    for key in ("mc1_targets", "mc2_targets")
                },
            },
        )
        for number, row in enumerate(rows, 1)
    ]


def _from_targets(where: str, item: Any) -> Question:
    """Build a question from `mc1_targets` and `mc2_targets`, each answer -> 1 (true) or 0."""
    if not isinstance(item, dict):
        raise ValueError(f"{where}: a question is an object; got {type(item).__name__}.")
    for key in ("question", "mc1_targets", "mc2_targets"):
        if key not in item:
            raise ValueError(f"{where}: {key!r} is missing; got {sorted(item)}.")
    groups = []
    for key in ("mc1_targets", "mc2_targets"):
        labels = item[key]
        if not isinstance(labels, dict) or not all(label in (0, 1) for label in labels.values()):
            raise ValueError(f"{where}: {key} must map each answer to 1 or 0; got {labels!r}.")
        groups += [
            [answer for answer, label in labels.items() if label == wanted] for wanted in (1, 0)
        ]
    best, mc1_wrong, right, wrong = groups
    if len(best) != 1:
        raise ValueError(f"{where}: mc1_targets must hold one right answer; got {len(best)}.")
    return _question(where, item["question"], best[0], right, wrong, mc1_wrong)


def _from_csv(where: str, row: dict[str, str]) -> Question:
    columns = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")
    for column in columns:
        if row.get(column) is None:
            raise ValueError(
                f"{where}: column {column!r} is missing; got {sorted(filter(None, row))}."
            )
    question, best, right, wrong = (row[column].strip() for column in columns)
    best_ones, right_ones, wrong_ones = (
        # As in mc_task.json: with a full stop, without duplicates, wrong if in both lists.
        list(dict.fromkeys(f"{a.strip().removesuffix('.')}." for a in answers if a.strip()))
        for answers in ([best], right.split(";"), wrong.split(";"))
    )
    if not best_ones:
        raise ValueError(f"{where}: there is no best answer.")
    right_ones = [answer for answer in right_ones if answer not in wrong_ones]
    return _question(where, question, best_ones[0], right_ones, wrong_ones, wrong_ones)


def _question(
    where: str, question: Any, best: str, right: list[str], wrong: list[str], mc1_wrong: list[str]
) -> Question:
    sources.texts(where, "question", [question])
    sources.texts(where, "an answer", [best, *right, *wrong, *mc1_wrong])
    if not right or best not in right:
        raise ValueError(f"{where}: the right answers {right} do not hold the best one, {best!r}.")
    if not wrong or not mc1_wrong:
        raise ValueError(f"{where}: there is no wrong answer.")
    sources.distinct(where, [*right, *wrong])
    sources.distinct(where, [best, *mc1_wrong])
    if set(right) & set(mc1_wrong):
        raise ValueError(f"{where}: an answer is right in mc2_targets and wrong in mc1_targets.")
    ordered = [best, *(answer for answer in right if answer != best)]
    return Question(where, question, ordered, wrong, mc1_wrong)
