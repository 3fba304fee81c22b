"""The objectives of a calibration, judged by held-out calibration questions and by the test."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.quality.measure import ALPHAS, Table, at, summary
from benchmarks.quality.tasks import Part, Task
from benchmarks.quality.work import Pass
from svd_engine.calibration.cross_validation import Fit, best_fit, fits
from svd_engine.calibration.options import CalibrationOptions
from svd_engine.calibration.support_stats import SupportStats

# (objective, length-normalised, direction)
OBJECTIVES = (
    ("ranking", False, "projected"),
    ("ranking", True, "projected"),
    ("preference", False, "projected"),
    ("preference", True, "projected"),
    ("ranking", False, "difference"),
    ("ranking", True, "difference"),
)
FOLDS = 5
Questions = NDArray[np.bool_]


def compared(task: Task, calibration: Pass, test: Pass) -> list[dict[str, Any]]:
    """Measure each objective's gain on held-out calibration questions and on the test.

    "changes" holds the change of every test question.
    """
    part, fold = task.calibration, folds(task.calibration)
    cases = []
    for objective, per_token, direction in OBJECTIVES:
        options = CalibrationOptions(
            objective, alphas=ALPHAS, length_normalised=per_token, direction=direction
        )
        fitted = fits(part.answers, calibration.entries, options)

        def choose(inside: Questions, fitted: list[Fit] = fitted) -> tuple[float, float]:
            chosen = best_fit(fitted, fold, inside)
            return chosen.estimate(inside), chosen.candidate.alpha

        def steered(
            part: Part, made: Pass, chosen: tuple[float, float], direction: str = direction
        ) -> Table:
            mu, alpha = chosen
            return at(part, kept(made, alpha, direction), mu)

        found = judge(task, calibration, test, choose, steered)
        cases.append({"objective": words(objective, per_token, direction)} | found)
    return cases


def kept(made: Pass, alpha: float, direction: str) -> SupportStats:
    return made.entries.at(alpha).along(direction)


def judge(
    task: Task,
    calibration: Pass,
    test: Pass,
    choose: Callable[[Questions], tuple[float, float]],
    steered: Callable[[Part, Pass, tuple[float, float]], Table],
) -> dict[str, Any]:
    """Measure a choice. choose: questions -> (mu, alpha); steered: the figures at that choice."""
    off = (0.0, 1.0)
    part, fold = task.calibration, folds(task.calibration)
    unsteered = steered(part, calibration, off)[:, -1]
    gains = np.empty(len(unsteered))
    for k in range(FOLDS):
        outside = fold == k
        values = steered(part, calibration, choose(~outside))[:, -1]
        gains[outside] = (values - unsteered)[outside]
    mu, alpha = choose(np.ones(len(unsteered), bool))
    change = steered(task.test, test, (mu, alpha)) - steered(task.test, test, off)
    return {
        "mu": mu,
        "alpha": alpha,
        "held out": summary(("gain",), gains[:, None])["gain"],
        "test": summary(task.columns, change)[task.columns[-1]],
        "changes": change[:, -1].tolist(),
    }


def folds(part: Part) -> NDArray[np.int64]:
    return np.random.default_rng(0).permutation(len(part.items)) % FOLDS


def words(objective: str, per_token: bool, direction: str) -> str:
    name = objective + (" a token" if per_token else "")
    return name if direction == "projected" else f"{name}, without the projection"


def grid(part: Part, scores: Tensor, objective: str, per_token: bool) -> Table:
    """Return the loss of every question at every column of log P `[answers, columns]`."""
    columns = scores.numpy()
    loss = part.answers.losses_of(lambda i: columns[:, int(i)], objective, per_token)
    return np.stack([loss(i) for i in range(columns.shape[1])], axis=1)
