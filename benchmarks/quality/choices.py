"""Ways to choose a steering from the calibration part, each judged on the test."""

from typing import Any

from benchmarks.quality.measure import at, found, summary
from benchmarks.quality.tables import words
from benchmarks.quality.tasks import Task
from benchmarks.quality.work import Passes
from svd_engine.calibration.calibrate import fit
from svd_engine.calibration.options import AUTO_ALPHAS, CalibrationOptions
from svd_engine.calibration.report import CalibrationReport

PAPER_ALPHA = 0.1
PAPER = "the paper's estimate"
# (objective, length-normalised, direction)
OBJECTIVES = (
    ("ranking", False, "projected"),
    ("ranking", True, "projected"),
    ("preference", False, "projected"),
    ("preference", True, "projected"),
    ("ranking", False, "difference"),
    ("ranking", True, "difference"),
)


def choices() -> dict[str, CalibrationOptions]:
    """Return the options of every way but `measure.AUTO`, by name."""
    every = {
        words(objective, per_token, direction): CalibrationOptions(
            objective,
            alphas=AUTO_ALPHAS,
            length_normalised=per_token,
            direction=direction,
            use="ranking",
        )
        for objective, per_token, direction in OBJECTIVES
    }
    paper = CalibrationOptions("ranking", "mean", alphas=(PAPER_ALPHA,), use="ranking")
    return every | {PAPER: paper}


def judged(task: Task, passes: Passes, auto: CalibrationReport) -> list[dict[str, Any]]:
    """Measure the gain of each way on the test; "changes" holds that of every test question."""
    reports = {"auto": auto} | {
        name: fit(task.calibration.answers, passes.calibration, options)
        for name, options in choices().items()
    }
    cases = [
        change(task, passes, name, report, report.strength) for name, report in reports.items()
    ]
    advised = auto.strength if auto.worthwhile else 0.0
    return [change(task, passes, "auto, where its verdict is to use it", auto, advised), *cases]


def change(
    task: Task, passes: Passes, name: str, report: CalibrationReport, strength: float
) -> dict[str, Any]:
    stats = passes.test.at(report.alpha).along(report.direction)
    gain = at(task.test, stats, strength) - at(task.test, stats, 0.0)
    return {
        "name": name,
        "mu": strength,
        "calibration": found(report),
        "gain": summary(task.columns, gain)[task.columns[-1]],
        "changes": gain[:, -1].tolist(),
    }
