"""Steered and un-steered under the decoding strategies of the paper's Table 5."""

from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from benchmarks.quality import work
from benchmarks.quality.measure import summary
from benchmarks.quality.tasks import Task
from svd_engine.calibration.report import CalibrationReport
from svd_engine.evaluate.commonsense import GENERATION_METRICS, Problem
from svd_engine.evaluate.journal import Journal
from svd_engine.steering_config import SteeringConfig

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam search, 4 beams": {"num_beams": 4},
    "top-p, 0.95": {"temperature": 1.0, "top_p": 0.95},
    "top-k, 10": {"temperature": 1.0, "top_k": 10},
}
PROBLEMS, TOKENS, BATCH = 100, 8, 20  # "the correct answer is answer1" is 7 tokens


def strategies(task: Task, folder: Path, report: CalibrationReport) -> list[dict[str, Any]]:
    """Measure accuracy by generation on the first test problems, one case per strategy."""
    engine = work.load(task, folder)
    engine.steering = SteeringConfig(
        report.strength, alpha=report.alpha, direction=report.direction
    )
    items = [item for item in task.test.items[:PROBLEMS] if isinstance(item, Problem)]
    passages = task.test.answers
    prompts = [passages.passages[right[0]].prompt for right in passages.right[:PROBLEMS]]
    settings = dict(
        strength=report.strength, alpha=report.alpha, direction=report.direction,
        problems=PROBLEMS, tokens=TOKENS,
    )  # fmt: skip
    journal = Journal(folder / "decoding.jsonl", settings)
    cases = []
    runs = [(name, model) for name in STRATEGIES for model in ("adapted", "steered")]
    for number, (name, model) in enumerate(tqdm(runs, desc="decoding")):
        if number not in journal.results:
            completions = engine.generate(
                prompts, model=model, max_new_tokens=TOKENS, batch_size=BATCH, **STRATEGIES[name]
            )
            journal.add({number: {"texts": [completion.text for completion in completions]}})
    for number, name in enumerate(STRATEGIES):
        adapted, steered = (
            100 * np.array([item.judged(text) for item, text in zip(items, texts, strict=True)])
            for texts in (journal.results[2 * number + i]["texts"] for i in range(2))
        )
        cases.append(
            {
                "strategy": name,
                "models": {
                    "adapted": summary(GENERATION_METRICS, adapted),
                    "steered": summary(GENERATION_METRICS, steered),
                },
                "gain": summary(GENERATION_METRICS, steered - adapted),
            }
        )
    return cases
