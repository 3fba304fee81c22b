"""Steering with one part taken out, each variant at its own calibrated strength."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality import work
from benchmarks.quality.choices import PAPER, PAPER_ALPHA
from benchmarks.quality.measure import Table, at, summary
from benchmarks.quality.tasks import Part, Task
from benchmarks.quality.work import Passes
from svd_engine.calibration.calibrate import fit
from svd_engine.calibration.options import AUTO_ALPHAS, CalibrationOptions
from svd_engine.calibration.report import CalibrationReport
from svd_engine.calibration.support_stats import SupportStats
from svd_engine.generation import scoring
from svd_engine.model.pair import ModelPair

PENALTY = -1000.0  # the paper's lambda in its code
ALPHAS = (0.001, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9)
OBJECTIVE, PER_TOKEN = "ranking", True
BLOCK = 8  # rows of logits processed at once, so that the intermediates stay in the cache
# The strengths of a direction over the whole vocabulary.
STRENGTHS = {
    "without the mask": (-64, -48, -32, -24, -16, -12, -8, -4, -2, 0, 2, 4, 8, 16),
    "without the projection": (-8, -4, -3, -2, -1.5, -1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1),
}
Unmasked = dict[str, Tensor]  # log P of each answer at each strength, `[answers, strengths]`


def variants(task: Task, passes: Passes, folder: Path) -> list[dict[str, Any]]:
    """Measure what each variant of the steering gains on the test part."""
    report = calibrated(task, passes, (PAPER_ALPHA,))
    mu, paper = report.strength, report.estimates["mean gauss-newton"]
    stats = passes.test.at(PAPER_ALPHA)
    found = {"as calibrated": (mu, task.test.answers.scores(stats, mu))}
    calibration, test = unmasked(task, folder)
    for name, strengths in STRENGTHS.items():
        best = int(grid(task.calibration, calibration[name]).sum(0).argmin())
        found[name] = strengths[best], test[name][:, best].numpy()
    found |= {
        "with a penalty": (mu, penalised(task.test, stats, mu)),
        PAPER: (paper, task.test.answers.scores(stats, paper)),
    }
    adapted = at(task.test, stats, 0.0)
    return [
        {"variant": name, "mu": mu, "gain": summary(task.columns, task.test.figures(s) - adapted)}
        for name, (mu, s) in found.items()
    ]


def alphas(task: Task, passes: Passes, _: Path) -> list[dict[str, Any]]:
    """Measure each alpha at its own strength: the gain on the test part, the supports' sizes."""
    adapted = at(task.test, passes.test, 0.0)
    found = []
    for alpha in ALPHAS:
        report = calibrated(task, passes, (alpha,))
        stats = passes.test.at(alpha)
        values = at(task.test, stats, report.strength)
        found.append(
            {
                "alpha": alpha,
                "mu": report.strength,
                "interval": list(report.interval),
                "loss": report.loss_after,
                "gain": summary(task.columns, values - adapted),
                "tokens": float(stats.support_sizes().double().mean()),
                "inside": float(stats.in_support.double().mean()),
            }
        )
    return found


def calibrated(
    task: Task, passes: Passes, alphas: tuple[float, ...] = AUTO_ALPHAS
) -> CalibrationReport:
    """Calibrate a strength for the paper's direction."""
    options = CalibrationOptions(
        OBJECTIVE, alphas=alphas, length_normalised=PER_TOKEN, use="ranking"
    )
    return fit(task.calibration.answers, passes.calibration, options)


def grid(part: Part, scores: Tensor) -> Table:
    """Return the loss of every question at every column of log P `[answers, columns]`."""
    columns = scores.numpy()
    loss = part.answers.losses_of(lambda i: columns[:, int(i)], OBJECTIVE, PER_TOKEN)
    return np.stack([loss(i) for i in range(columns.shape[1])], axis=1)


def unmasked(task: Task, folder: Path) -> list[Unmasked]:
    """Return log P of the answers of both parts without the mask, made if missing."""
    path = folder / "unmasked.pt"
    if not path.is_file():
        pair = work.load(task, folder).pair
        made = [over_vocabulary(pair, part) for part in (task.calibration, task.test)]
        torch.save(made, path)
    found: list[Unmasked] = torch.load(path)
    return found


@torch.inference_mode()
def over_vocabulary(pair: ModelPair, part: Part) -> Unmasked:
    """Score the answers under z + mu delta and under z + mu g, the gradient itself.

    The gradient is g = -(log p - log q + 1), so z + mu g is (1 - mu) z + mu b up to a constant.
    """
    passages = part.answers.passages
    tables = {
        name: torch.zeros(len(passages), len(strengths), dtype=torch.float64)
        for name, strengths in STRENGTHS.items()
    }
    for logits, target, passage in scoring.predictions(pair, passages, "without the mask"):
        for rows in torch.arange(len(target)).split(BLOCK):
            z, b, y = logits[0][rows].float(), logits[-1][rows].float(), target[rows, None]
            d = z - b
            p = z.softmax(-1)
            delta = p * (torch.linalg.vecdot(p, d)[:, None] - d)
            for (name, strengths), direction in zip(STRENGTHS.items(), (delta, -d), strict=True):
                add(tables[name], strengths, z, direction, y, passage[rows])
    return tables


def add(
    table: Tensor, strengths: Sequence[float], z: Tensor, direction: Tensor, y: Tensor, row: Tensor
) -> None:
    """Add log P of the tokens y to their passages' rows, a column per strength."""
    for column, mu in enumerate(strengths):
        steered = torch.add(z, direction, alpha=mu)
        logp = steered.gather(-1, y)[:, 0] - steered.logsumexp(-1)
        table[:, column].index_add_(0, row, logp.double().cpu())


def penalised(part: Part, stats: SupportStats, mu: float) -> Table:
    """Return log P of every passage if tokens off the support get |mu| PENALTY (14)."""
    count = len(stats.adapted)

    def over(values: Tensor) -> Tensor:
        return torch.zeros(count, dtype=values.dtype).index_add_(0, stats.position, values)

    off = abs(mu) * PENALTY
    kept = over(stats.p * torch.exp(mu * stats.delta)).log()
    left = (1 - over(stats.p)).clamp(1e-300).log() + off
    added = torch.where(stats.in_support, mu * stats.target_delta, off)
    logp = stats.adapted + added - torch.logaddexp(kept, left)
    return stats.totals(logp, len(part.answers.passages)).numpy()
