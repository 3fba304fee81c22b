"""Calibration losses L_e(mu) of each example e as functions of the strength mu.

nll         - sum over the right answers' tokens of log P_mu(token)
preference  mean over right and wrong answers of log(1 + exp(s_wrong(mu) - s_right(mu))),
            s = log P_mu(answer), or that divided by the answer's number of tokens
ranking     mean over the same pairs of 1 / (1 + exp(s_right(mu) - s_wrong(mu))): a smooth share
            of pairs in the wrong order
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from svd_engine.calibration.support_stats import SupportStats
from svd_engine.data.examples import Example
from svd_engine.generation.scoring import Passage

OBJECTIVES = ("preference", "ranking", "nll")
Array = NDArray[np.float64]
Losses = Callable[[float], Array]


class Answers:
    """The answers of all examples as passages, and losses from their log-probabilities."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.passages: list[Passage] = []
        self.right: list[list[int]] = []  # passages of the right answers, the completion first
        self.wrong: list[list[int]] = []
        for example in examples:
            self.right.append(self._add(example.prompt, (example.completion, *example.accepted)))
            self.wrong.append(self._add(example.prompt, example.rejected))
        self.lengths = np.array([len(passage.completion) for passage in self.passages], float)

    def _add(self, prompt: list[int], answers: Sequence[list[int]]) -> list[int]:
        start = len(self.passages)
        self.passages += [Passage(prompt, answer) for answer in answers]
        return list(range(start, len(self.passages)))

    def scores(self, stats: SupportStats, strength: float) -> Array:
        """log P_mu of each passage."""
        return stats.totals(stats.logprob(strength), len(self.passages)).numpy()

    def tokens(self) -> Array:
        """The number of right answers' tokens of each example."""
        return np.array([self.lengths[right].sum() for right in self.right])

    def right_tokens(self, stats: SupportStats) -> NDArray[np.int64]:
        """Indices of the target tokens that belong to right answers."""
        right = torch.tensor([i for passages in self.right for i in passages])
        return torch.isin(stats.passage, right).nonzero()[:, 0].numpy()

    def example_of(self) -> NDArray[np.int64]:
        """The index of the example of each passage."""
        counts = [len(r) + len(w) for r, w in zip(self.right, self.wrong, strict=True)]
        return np.repeat(np.arange(len(counts)), counts)

    def losses(
        self, stats: SupportStats, objective: str, length_normalised: bool = False
    ) -> Losses:
        """Return the function strength -> loss of every example."""
        return self.losses_of(partial(self.scores, stats), objective, length_normalised)

    def losses_of(
        self, scores: Callable[[float], Array], objective: str, length_normalised: bool = False
    ) -> Losses:
        """Do the same from any function strength -> log P of each passage."""
        count = len(self.right)
        if objective == "nll":
            right = np.concatenate(self.right)
            owner = self.example_of()[right]

            def nll(strength: float) -> Array:
                return _sums(owner, -scores(strength)[right], count)

            return nll

        pairs = np.array(
            [
                (e, r, w)
                for e, (right, wrong) in enumerate(zip(self.right, self.wrong, strict=True))
                for r in right
                for w in wrong
            ]
        )
        owner, better, worse = pairs.T
        share = 1 / np.bincount(owner, minlength=count)[owner]
        units = self.lengths if length_normalised else np.ones(len(self.passages))

        def compared(strength: float) -> Array:
            values = scores(strength) / units
            lost = np.logaddexp(0.0, values[worse] - values[better])
            if objective == "ranking":
                lost = -np.expm1(-lost)
            return _sums(owner, share * lost, count)

        return compared


def _sums(owner: NDArray[np.int64], values: Array, count: int) -> Array:
    """Sum the values of each of `count` owners."""
    return np.bincount(owner, values, minlength=count).astype(np.float64)
