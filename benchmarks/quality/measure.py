"""The worth of steering on a warm start: calibrated on one part of a task, measured on another."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.tasks import Part, Task
from benchmarks.quality.work import Passes
from svd_engine.calibration.calibrate import fit
from svd_engine.calibration.estimators import BRACKET, GRID
from svd_engine.calibration.options import AUTO, AUTO_ALPHAS, CalibrationOptions
from svd_engine.calibration.report import CalibrationReport
from svd_engine.calibration.support_stats import SupportStats
from svd_engine.utils import bootstrap

CURVE = [float(mu) for mu in GRID[::4]]
REPORTED = (
    "objective",
    "length_normalised",
    "direction",
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


def at(part: Part, stats: SupportStats, strength: float) -> Table:
    """Return the figures of every question at a strength, `[questions, columns]`."""
    return part.figures(part.answers.scores(stats, strength))


def summary(columns: Sequence[str], values: Table) -> dict[str, dict[str, float]]:
    """Return each column's mean and 95 % bootstrap interval over questions."""
    spans = bootstrap.of_means(values)
    return {
        name: {"mean": float(mean), "low": float(low), "high": float(high)}
        for name, mean, (low, high) in zip(columns, values.mean(0), spans, strict=True)
    }


def calibrated(task: Task, passes: Passes) -> CalibrationReport:
    """Choose objective, direction, alpha and strength on the calibration part."""
    options = CalibrationOptions(AUTO, alphas=AUTO_ALPHAS, direction=AUTO, use="ranking")
    return fit(task.calibration.answers, passes.calibration, options)


def worth(
    task: Task, passes: Passes, report: CalibrationReport
) -> tuple[dict[str, Any], Mapping[str, Table]]:
    """Return a case of results, and the figures of every test question by model."""
    stats = passes.test.at(report.alpha).along(report.direction)
    totals = stats.totals(stats.base, len(task.test.answers.passages))
    models = {
        "base": task.test.figures(totals.numpy()),
        "adapted": at(task.test, stats, 0.0),
        "steered": at(task.test, stats, report.strength),
    }
    case = {
        "questions": [len(task.calibration.items), len(task.test.items)],
        "calibration": found(report),
        "models": {name: summary(task.columns, values) for name, values in models.items()},
        "gain": summary(task.columns, models["steered"] - models["adapted"]),
    }
    return case, models


def estimators(task: Task, passes: Passes, report: CalibrationReport) -> dict[str, Any]:
    """Measure the figure on the test at the strength of every estimator, and along a curve."""
    stats = passes.test.at(report.alpha).along(report.direction)
    strengths = {"optimum": report.optimum, "likelihood": report.likelihood_strength}
    strengths |= report.estimates

    def figure(mu: float) -> float:
        return float(at(task.test, stats, float(np.clip(mu, -BRACKET, BRACKET)))[:, -1].mean())

    return {
        "estimators": {name: {"mu": mu, "figure": figure(mu)} for name, mu in strengths.items()},
        "curve": [[mu, figure(mu)] for mu in CURVE],
    }


def found(report: CalibrationReport) -> dict[str, Any]:
    """Return the part of a report that the results hold."""
    values = {name: getattr(report, name) for name in REPORTED}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def likelihood(task: Task, passes: Passes) -> dict[str, Any]:
    """Calibrate on the likelihood, and measure the change in the NLL of the test's answers."""
    options = CalibrationOptions("nll", alphas=AUTO_ALPHAS)
    report = fit(task.calibration.answers, passes.calibration, options)
    answers, stats = task.test.answers, passes.test.at(report.alpha)
    right = np.concatenate(answers.right)
    before, after = (
        -answers.scores(stats, mu)[right].sum() / answers.tokens().sum()
        for mu in (0.0, report.strength)
    )
    return found(report) | {
        "test_before": float(before),
        "test_change": float(after - before),
        "held_out_change": report.nll_after - report.nll_before,
    }
