"""Guesses of a smaller model, which follows the texts of a batch in a cache of its own."""

from collections.abc import Sequence as ListOf

import torch
from torch import Tensor

from svd_engine import ops
from svd_engine.generation.distribution import unsteered
from svd_engine.generation.request import Request
from svd_engine.generation.sequence import Sequence
from svd_engine.model.pair import ModelPair
from svd_engine.model.runner import padded


class Assistant:
    """A model beside a batch, which has read each row's prompt.

    It draws with the noise of the request: a token that both models would draw is guessed, greedy
    or sampled.
    """

    def __init__(self, model: ModelPair, request: Request, sequences: ListOf[Sequence]) -> None:
        self._model, self._request = model, request
        new = max(sequence.max_new_tokens for sequence in sequences)
        most = 0 if request.speculation is None else request.speculation.most
        # A row is padded as far as another one is behind.
        model.prefill([s.prompt_ids for s in sequences], 2 * new + most)
        self._read = [len(sequence.prompt_ids) for sequence in sequences]  # tokens of each text
        self._guessed: list[list[int]] = [[] for _ in sequences]  # read after them

    def guess(self, rows: ListOf[Sequence], count: int, seeds: Tensor) -> list[list[int]]:
        """Return `count` tokens after the text of each row. seeds: of the rows."""
        self._forget_wrong(rows)
        texts = [sequence.all_ids for sequence in rows]
        behind = [text[read:] for text, read in zip(texts, self._read, strict=True)]
        tokens = padded(behind).to(self._model.device)
        lengths = torch.tensor([len(each) for each in behind], device=tokens.device)
        hidden = self._model.extend(tokens)
        row = torch.arange(len(rows), device=tokens.device)
        logits = self._model.logits([h[row, lengths - 1] for h in hidden])[0]
        self._model.set_back(tokens.shape[1] - lengths)
        positions = torch.tensor([len(text) for text in texts], device=tokens.device)
        drawn = [draw(self._request, logits, seeds, positions)]
        for i in range(1, count):
            logits = self._model.step(drawn[-1])[0]
            drawn.append(draw(self._request, logits, seeds, positions + i))
        guesses: list[list[int]] = torch.stack(drawn, 1).tolist()
        self._read = [len(text) for text in texts]
        self._guessed = [guess[:-1] for guess in guesses]
        return guesses

    def reorder(self, index: Tensor) -> None:
        """Let row i continue from former row index[i]."""
        self._model.reorder(index)
        self._read = [self._read[i] for i in index.tolist()]
        self._guessed = [self._guessed[i] for i in index.tolist()]

    def _forget_wrong(self, rows: ListOf[Sequence]) -> None:
        """Go back to where what was read parts from each text, or ends before its last token."""
        wrong = []
        for i, sequence in enumerate(rows):
            guess, text = self._guessed[i], sequence.all_ids[self._read[i] : -1]
            agreed = next(
                (j for j, (a, b) in enumerate(zip(guess, text, strict=False)) if a != b),
                min(len(guess), len(text)),
            )
            wrong.append(len(guess) - agreed)
            self._read[i] += agreed
        self._model.set_back(torch.tensor(wrong, device=self._model.device))


def draw(request: Request, logits: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draw what a model alone would draw, `[rows]`."""
    sampling, drawn_from = request.sampling, unsteered(logits)
    token, _ = ops.sample(
        *drawn_from.operands,
        **drawn_from.mask,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=seeds,
        position=positions,
    )
    return token.clamp(min=0)
