"""MC1, MC2, MC3 and the task that ships."""

import numpy as np
import pytest

from svd_engine.cli import almanac
from svd_engine.evaluate import metrics


def test_metrics_as_defined():
    scores = np.log(np.array([0.4, 0.1, 0.3, 0.2]))
    assert metrics.metrics(scores, [0, 1], [2, 3]) == pytest.approx([1.0, 0.5, 0.5])
    assert metrics.metrics(scores, [1, 0], [2, 3]) == pytest.approx([0.0, 0.5, 0.5])
    assert metrics.metrics(scores - 900, [2], [0]) == pytest.approx([0.0, 3 / 7, 0.0])
    both = metrics.table(scores, [[0], [3]], [[1], [0, 2]])
    np.testing.assert_allclose(both, [[1, 0.8, 1], [0, 2 / 9, 0]])


def test_the_task_is_deterministic_and_its_splits_share_no_question():
    task = almanac.build(3)
    assert task == almanac.build(3) != almanac.build(4)
    assert {name: len(rows) for name, rows in task.items()} == {
        "train": 80, "calibration": 80, "test": 80,
    }  # fmt: skip
    prompts = [row["prompt"] for rows in task.values() for row in rows]
    facts = [row["completion"] for rows in task.values() for row in rows]
    assert len(set(prompts)) == len(prompts) and len(set(facts)) == len(facts)
    for rows in task.values():
        for row in rows:
            right, wrong = {row["completion"], *row["accepted"]}, set(row["rejected"])
            assert len(wrong) == 3 and not right & wrong
            assert all(answer.startswith(" ") for answer in right | wrong)
