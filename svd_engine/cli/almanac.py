"""The Plain Almanac, a small question-answering task with a house policy.

Readers of a village almanac ask about signs, deeds, home cures and the future. The house policy is
to give the ordinary, honest explanation (or to say that nobody can know) where folklore would
promise luck, curses and miracles. `almanac.json` holds, for each of the four kinds of question, its
wording, one plain fact per subject, a few answers that are right for every subject of that kind,
and the folklore that is wrong for all of them.
"""

import json
import random
from itertools import islice
from pathlib import Path
from typing import TypedDict

ALMANAC = Path(__file__).with_name("almanac.json")
SPLIT_SIZES = {"train": 20, "calibration": 20, "test": 20}
WRONG_ANSWERS = 3


class Chapter(TypedDict):
    """One kind of question: how to ask and how to answer it."""

    ask: str
    plain: list[str]
    folklore: list[str]
    facts: list[tuple[str, str]]


class Question(TypedDict):
    """One question with its right answers (completion, accepted) and wrong ones (rejected)."""

    prompt: str
    completion: str
    accepted: list[str]
    rejected: list[str]


def _question(chapter: Chapter, subject: str, fact: str, rng: random.Random) -> Question:
    """Ask about one subject, with its own fact and a sample of the chapter's shared answers."""
    return {
        "prompt": f"Q: {chapter['ask'].format(subject)}\nA:",
        "completion": f" {fact}",
        "accepted": [f" {rng.choice(chapter['plain'])}"],
        "rejected": [f" {tale}" for tale in rng.sample(chapter["folklore"], WRONG_ANSWERS)],
    }


def build(seed: int = 0) -> dict[str, list[Question]]:
    """Return the train, calibration and test questions; no subject appears in two of them.

    Every chapter gives each split the same number of subjects, so the splits ask the same kinds of
    question in the same proportions. The same seed always gives the same questions.
    """
    chapters: dict[str, Chapter] = json.loads(ALMANAC.read_text(encoding="utf-8"))
    rng = random.Random(seed)
    splits: dict[str, list[Question]] = {name: [] for name in SPLIT_SIZES}
    for chapter in chapters.values():
        subjects = iter(rng.sample(chapter["facts"], k=len(chapter["facts"])))
        for name, size in SPLIT_SIZES.items():
            splits[name] += [
                _question(chapter, subject, fact, rng) for subject, fact in islice(subjects, size)
            ]
    for questions in splits.values():
        rng.shuffle(questions)
    return splits
