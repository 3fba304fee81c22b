"""The worth of steering on a warm start: calibrated on one part of a task, measured on another."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.tasks import Part, Task
from benchmarks.quality.work import Pass
from svd_engine.calibration.calibrate import fit
from svd_engine.calibration.estimators import BRACKET, GRID
from svd_engine.calibration.options import CalibrationOptions
from svd_engine.calibration.report import CalibrationReport
from svd_engine.calibration.support_stats import SupportStats
from svd_engine.utils import bootstrap

ALPHAS = (0.01, 0.1, 0.3)  # the candidates of a calibration
OBJECTIVE, PER_TOKEN = "ranking", True  # of the calibrations
CURVE = [float(mu) for mu in GRID[::4]]
REPORTED = (
    "strength",
    "alpha",
    "interval",
    "loss_before",
    "loss_after",
    "gain_interval",
    "nll_before",
    "nll_after",
    "verdict",
    "single_share",
)
Table = NDArray[np.float64]


def at(part: Part, entries: SupportStats, strength: float) -> Table:
    """Return the figures of every question at a strength, `[questions, columns]`."""
    return part.figures(part.answers.scores(entries, strength))


def summary(columns: tuple[str, ...], values: Table) -> dict[str, dict[str, float]]:
    """Return each column's mean and 95 % bootstrap interval over questions."""
    spans = bootstrap.of_means(values)
    return {
        name: {"mean": float(mean), "low": float(low), "high": float(high)}
        for name, mean, (low, high) in zip(columns, values.mean(0), spans, strict=True)
    }


def calibrated(
    task: Task, calibration: Pass, alphas: Sequence[float] = ALPHAS
) -> CalibrationReport:
    """Calibrate strength and alpha on the calibration part."""
    answers = task.calibration.answers
    options = CalibrationOptions(OBJECTIVE, alphas=tuple(alphas), length_normalised=PER_TOKEN)
    return fit(answers, calibration.entries, options)


def worth(task: Task, calibration: Pass, test: Pass) -> tuple[dict[str, Any], Mapping[str, Table]]:
    """Return a case of results, and the figures of every test question by model."""
    report = calibrated(task, calibration)
    entries = test.entries.at(report.alpha)
    totals = entries.totals(entries.base, len(task.test.answers.passages))
    models = {
        "base": task.test.figures(totals.numpy()),
        "adapted": at(task.test, entries, 0.0),
        "steered": at(task.test, entries, report.strength),
    }
    strengths = {"optimum": report.strength, "likelihood": report.likelihood_strength}
    strengths |= report.estimates

    def figure(mu: float) -> float:
        return float(at(task.test, entries, mu)[:, -1].mean())

    case = {
        "questions": [len(task.calibration.items), len(task.test.items)],
        "calibration": found(report),
        "models": {name: summary(task.columns, values) for name, values in models.items()},
        "gain": summary(task.columns, models["steered"] - models["adapted"]),
        "estimators": {
            name: {"mu": mu, "figure": figure(float(np.clip(mu, -BRACKET, BRACKET)))}
            for name, mu in strengths.items()
        },
        "curve": [[mu, figure(mu)] for mu in CURVE],
    }
    return case, models


def found(report: CalibrationReport) -> dict[str, Any]:
    """Return the part of a report that the results hold."""
    values = {name: getattr(report, name) for name in REPORTED}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def likelihood(task: Task, calibration: Pass, test: Pass) -> dict[str, Any]:
    """Calibrate on the likelihood, and measure the change in the NLL of the test's answers."""
    options = CalibrationOptions("nll", alphas=ALPHAS)
    report = fit(task.calibration.answers, calibration.entries, options)
    answers, entries = task.test.answers, test.entries.at(report.alpha)
    right = np.concatenate(answers.right)
    before, after = (
        -answers.scores(entries, mu)[right].sum() / answers.tokens().sum()
        for mu in (0.0, report.strength)
    )
    return found(report) | {
        "test_before": float(before),
        "test_change": float(after - before),
        "held_out_change": report.nll_after - report.nll_before,
    }
