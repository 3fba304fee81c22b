"""The strength that suits a calibration set, and whether steering is worth turning on.

Both objectives are losses L_e(mu) of each example e:

    nll         - sum over the answer's tokens of log P_mu(token)
    preference  mean over its right and wrong answers of log(1 + exp(s_wrong(mu) - s_right(mu))),
                s = log P_mu(answer)

The first is convex, so its optimum is the exact strength; the second is searched over the whole
bracket. One pass over the data serves every mu (see `supports`).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from svd_engine import intervals, supports
from svd_engine.branches import Branches
from svd_engine.examples import Example
from svd_engine.files import write_text
from svd_engine.supports import Supports
from svd_engine.teacher import Passage

OBJECTIVES = ("preference", "nll")
BRACKET = 64.0  # |mu| beyond it is never tried
REPORT_FILE = "calibration_report.json"
Array = NDArray[np.float64]
# Dense where the optimum of the likelihood lies, wide enough for ranking.
GRID: Array = np.sinh(np.linspace(-1, 1, 257) * np.arcsinh(BRACKET))


@dataclass
class CalibrationReport:
    """The estimate and what it is worth. Losses are means, in nats, on examples not fitted."""

    objective: str
    alpha: float
    strength: float
    interval: tuple[float, float]  # 95 % bootstrap
    likelihood_strength: float  # the exact optimum of the right answers' likelihood
    paper_mean: float  # the mean of (44) with the Gauss-Newton denominator, for comparison
    loss_before: float  # of the objective at strength 0
    loss_after: float
    gain_interval: tuple[float, float]  # of loss_before - loss_after
    nll_before: float  # per token of the right answers
    nll_after: float
    support_share: float  # of the right answers' tokens that lie in the support
    single_share: float  # of positions whose support is one token
    examples: int
    tokens: int
    at_bracket: bool  # the optimum is at the end of what was searched
    verdict: str
    worthwhile: bool
    curve: list[tuple[float, float]]  # (mu, loss on all examples)

    def save(self, folder: str | Path) -> Path:
        path = Path(folder) / REPORT_FILE
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")
        return path


def calibrate(
    pair: Branches,
    examples: Sequence[Example],
    *,
    objective: str | None = None,
    alpha: float = 0.1,
    folds: int = 5,
    seed: int = 0,
    progress: bool = False,
) -> CalibrationReport:
    """Fit the strength to examples; by default on preference where there are rejected answers.

    The held-out figures come from `folds`-fold cross-validation over examples. Raises ValueError.
    """
    if objective is None:
        objective = "preference" if any(e.rejected for e in examples) else "nll"
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {objective!r}.")
    if objective == "preference":
        for i, example in enumerate(examples):
            if not example.rejected:
                raise ValueError(f"examples[{i}] has no rejected answers to prefer against.")
    if not 2 <= folds <= len(examples):
        raise ValueError(
            f"folds must lie in [2, number of examples = {len(examples)}]; got {folds}."
        )
    answers = Answers(examples)
    entries = supports.collect(pair, answers.passages, alpha, "calibrating" if progress else None)
    losses = answers.losses(entries, objective)
    weights = answers.tokens(entries) if objective == "nll" else np.ones(len(examples))
    nll, nll_weights = answers.losses(entries, "nll"), answers.tokens(entries)

    curves = np.stack([losses(mu) for mu in GRID], axis=1)
    strength = _minimise(losses, np.ones(len(examples)), curves)
    likeliest = _minimise(nll, np.ones(len(examples)), np.stack([nll(mu) for mu in GRID], axis=1))
    draws = intervals.resamples(len(examples), seed)
    interval = intervals.percentiles(np.array([_lowest(draw @ curves) for draw in draws]))

    fold = np.random.default_rng(seed).permutation(len(examples)) % folds
    before, after = losses(0.0), np.empty(len(examples))
    nll_before, nll_after = nll(0.0), np.empty(len(examples))
    for k in range(folds):
        kept = (fold != k).astype(float)
        mu = _minimise(losses, kept, curves)
        after[fold == k], nll_after[fold == k] = losses(mu)[fold == k], nll(mu)[fold == k]
    gain = intervals.of_ratio(before - after, weights, seed)

    right = answers.right_tokens(entries)
    numerator, gauss_newton = (x[right] for x in entries.projections())
    return CalibrationReport(
        objective=objective,
        alpha=alpha,
        strength=strength,
        interval=interval,
        likelihood_strength=likeliest,
        paper_mean=float((numerator / (gauss_newton + 1e-12)).mean()),
        loss_before=float(before.sum() / weights.sum()),
        loss_after=float(after.sum() / weights.sum()),
        gain_interval=gain,
        nll_before=float(nll_before.sum() / nll_weights.sum()),
        nll_after=float(nll_after.sum() / nll_weights.sum()),
        support_share=float(entries.in_support[right].double().mean()),
        single_share=float((entries.support_sizes() == 1).double().mean()),
        examples=len(examples),
        tokens=len(entries.adapted),
        at_bracket=abs(strength) > 0.99 * BRACKET,
        verdict=_verdict(gain),
        worthwhile=gain[0] > 0,
        curve=[
            (float(mu), float(total))
            for mu, total in zip(GRID, curves.sum(0) / weights.sum(), strict=True)
        ],
    )


class Answers:
    """Every answer of every example as a passage, and losses from their log-probabilities."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.passages: list[Passage] = []
        self.right: list[list[int]] = []  # passages of the right answers, the completion first
        self.wrong: list[list[int]] = []
        for example in examples:
            self.right.append(self._add(example.prompt, (example.completion, *example.accepted)))
            self.wrong.append(self._add(example.prompt, example.rejected))

    def _add(self, prompt: list[int], answers: Sequence[list[int]]) -> list[int]:
        start = len(self.passages)
        self.passages += [Passage(prompt, answer) for answer in answers]
        return list(range(start, len(self.passages)))

    def scores(self, entries: Supports, mu: float) -> Array:
        """log P_mu of each passage."""
        return entries.totals(entries.logprob(mu), len(self.passages)).numpy()

    def tokens(self, entries: Supports) -> Array:
        """Tokens of the right answers of each example."""
        counts = entries.totals(torch.ones_like(entries.adapted), len(self.passages)).numpy()
        return np.array([counts[right].sum() for right in self.right])

    def right_tokens(self, entries: Supports) -> torch.Tensor:
        """Which target tokens belong to right answers, `[T]` bool."""
        return torch.isin(entries.passage, torch.tensor([i for right in self.right for i in right]))

    def losses(self, entries: Supports, objective: str) -> Callable[[float], Array]:
        """mu -> L_e(mu) of every example."""

        def nll(mu: float) -> Array:
            scores = self.scores(entries, mu)
            return np.array([-scores[right].sum() for right in self.right])

        def preference(mu: float) -> Array:
            scores = self.scores(entries, mu)
            return np.array(
                [
                    np.logaddexp(0.0, scores[wrong][None, :] - scores[right][:, None]).mean()
                    for right, wrong in zip(self.right, self.wrong, strict=True)
                ]
            )

        return nll if objective == "nll" else preference


def _lowest(curve: Array) -> float:
    """The mu of the lowest point of a curve over GRID."""
    return float(GRID[np.argmin(curve)])


def _minimise(losses: Callable[[float], Array], counts: Array, curves: Array) -> float:
    """The global minimum of counts @ losses(mu): the best point of GRID, then ever finer grids."""
    best = int(np.argmin(counts @ curves))
    low, high = GRID[max(best - 1, 0)], GRID[min(best + 1, len(GRID) - 1)]
    while high - low > 1e-4 * max(1.0, abs(low)):
        points = np.linspace(low, high, 9)
        i = int(np.argmin([counts @ losses(mu) for mu in points]))
        low, high = points[max(i - 1, 0)], points[min(i + 1, 8)]
    return float((low + high) / 2)


def _verdict(gain: tuple[float, float]) -> str:
    if gain[0] > 0:
        return "use it: held-out examples gain, and the interval of the gain is above 0"
    if gain[1] < 0:
        return "do not use it: held-out examples lose"
    return "indifferent: the interval of the held-out gain contains 0; leave steering off"
