"""Steering with one part taken out, each variant at its own calibrated strength."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.measure import OBJECTIVE, PER_TOKEN, Table, at, calibrated, summary
from benchmarks.quality.objectives import grid
from benchmarks.quality.tasks import Part, Task
from benchmarks.quality.work import RAW, WHOLE, Pass
from svd_engine.calibration.support_stats import SupportStats

PENALTY = -1000.0  # the paper's lambda in its code
ALPHA = 0.1  # the paper's
ALPHAS = (0.001, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9)


def variants(task: Task, calibration: Pass, test: Pass) -> list[dict[str, Any]]:
    """Measure what each variant of the steering gains on the test part."""
    report = calibrated(task, calibration, (ALPHA,))
    mu, paper = report.strength, report.estimates["mean gauss-newton"]
    entries = test.entries.at(ALPHA)
    whole, raw = (
        int(grid(task.calibration, table, OBJECTIVE, PER_TOKEN).sum(0).argmin())
        for table in (calibration.whole, calibration.raw)
    )
    found = {
        "as calibrated": (mu, task.test.answers.scores(entries, mu)),
        "without the mask": (WHOLE[whole], test.whole[:, whole].numpy()),
        "without the projection": (RAW[raw], test.raw[:, raw].numpy()),
        "with a penalty": (mu, penalised(task.test, entries, mu)),
        "the paper's estimate": (paper, task.test.answers.scores(entries, paper)),
    }
    adapted = at(task.test, entries, 0.0)
    return [
        {"variant": name, "mu": mu, "gain": summary(task.columns, task.test.figures(s) - adapted)}
        for name, (mu, s) in found.items()
    ]


def alphas(task: Task, calibration: Pass, test: Pass) -> list[dict[str, Any]]:
    """Measure each alpha at its own strength: the gain on the test part, the supports' sizes."""
    adapted = at(task.test, test.entries, 0.0)
    found = []
    for alpha in ALPHAS:
        report = calibrated(task, calibration, (alpha,))
        entries = test.entries.at(alpha)
        values = at(task.test, entries, report.strength)
        found.append(
            {
                "alpha": alpha,
                "mu": report.strength,
                "interval": list(report.interval),
                "loss": report.loss_after,
                "gain": summary(task.columns, values - adapted),
                "tokens": float(entries.support_sizes().double().mean()),
                "inside": float(entries.in_support.double().mean()),
            }
        )
    return found


def penalised(part: Part, entries: SupportStats, mu: float) -> Table:
    """Return log P of every passage if tokens off the support get |mu| PENALTY (14)."""
    count = len(entries.adapted)

    def over(values: Tensor) -> Tensor:
        return torch.zeros(count, dtype=values.dtype).index_add_(0, entries.position, values)

    off = abs(mu) * PENALTY
    kept = over(entries.p * torch.exp(mu * entries.delta)).log()
    left = (1 - over(entries.p)).clamp(1e-300).log() + off
    added = torch.where(entries.in_support, mu * entries.target_delta, off)
    logp = entries.adapted + added - torch.logaddexp(kept, left)
    return entries.totals(logp, len(part.answers.passages)).numpy()
