"""Guesses of the adapted model itself, which goes ahead where each model has its own pass."""

from collections.abc import Sequence as ListOf

import torch
from torch import Tensor

from svd_engine.generation.assistant import draw
from svd_engine.generation.request import Request
from svd_engine.generation.sequence import Sequence
from svd_engine.model.pair import PerModel, SequentialRunner


class Ahead:
    """The adapted model of a pair, some tokens ahead of the base, which reads them in one pass."""

    def __init__(self, pair: SequentialRunner, request: Request) -> None:
        self._adapted, self._base = pair.runners
        self._request = request
        self._logits = torch.empty(0)  # of the adapted model, [rows, q, V]

    def guess(self, rows: ListOf[Sequence], count: int, seeds: Tensor) -> list[list[int]]:
        """Read the latest token of each row and `count` guesses; return the guesses.

        seeds: of the rows.
        """
        device = seeds.device
        positions = torch.tensor([len(sequence.all_ids) for sequence in rows], device=device)
        tokens = [torch.tensor([sequence.token_ids[-1] for sequence in rows], device=device)]
        logits = [self._adapted.step(tokens[0])]
        for i in range(count):
            tokens.append(draw(self._request, logits[-1], seeds, positions + i))
            logits.append(self._adapted.step(tokens[-1]))
        self._logits = torch.stack(logits, 1)
        guesses: list[list[int]] = torch.stack(tokens[1:], 1).tolist()
        return guesses

    def step(self, tokens: Tensor) -> PerModel:
        """Return logits of (adapted, base) after the tokens that the adapted model has read."""
        return self._logits, self._base.step(tokens)

    def reorder(self, index: Tensor) -> None:
        """Nothing is kept from one step to the next."""
