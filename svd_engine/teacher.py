"""Teacher forcing: what both models predict at every token of given completions."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from svd_engine import ops
from svd_engine.branches import Branches

BATCH_TOKENS = 2048
ROWS = 128  # positions whose `[ROWS, V]` logits are held at once


class Passage(NamedTuple):
    """A prompt and the completion whose tokens are to be predicted."""

    prompt: list[int]
    completion: list[int]


class Predictions(NamedTuple):
    """Some positions of some passages, `n` of them."""

    logits: tuple[Tensor, ...]  # adapted and base (or one model's), [n, V] each
    target: Tensor  # [n] int64
    passage: Tensor  # [n] int64, index of the passage


@torch.inference_mode()
def predictions(
    branches: Branches, passages: Sequence[Passage], progress: str | None = None
) -> Iterator[Predictions]:
    """Every completion token of every passage once, a few positions at a time.

    Memory does not grow with the number of passages: logits are made for `ROWS` positions at once.
    """
    with tqdm(total=len(passages), desc=progress, disable=progress is None, leave=False) as bar:
        for batch in _batches(passages):
            device = branches.device
            lengths = [len(passages[i].prompt) + len(passages[i].completion) for i in batch]
            tokens = torch.zeros(len(batch), max(lengths), dtype=torch.int64)
            places: list[tuple[int, int, int]] = []  # row, column of a logit, passage
            for r, i in enumerate(batch):
                prompt, completion = passages[i]
                tokens[r, : lengths[r]] = torch.tensor(prompt + completion)
                places += [(r, c, i) for c in range(len(prompt) - 1, lengths[r] - 1)]
            row, column, index = torch.tensor(places).T
            target = tokens[row, column + 1].to(device)
            hidden = branches.prefill(tokens.to(device), lengths)
            for part in torch.arange(len(places)).split(ROWS):
                logits = branches.logits([h[row[part], column[part]] for h in hidden])
                yield Predictions(logits, target[part], index[part])
            bar.update(len(batch))


def _batches(passages: Sequence[Passage]) -> Iterator[list[int]]:
    """Indices grouped by length, `BATCH_TOKENS` padded tokens a group at most."""
    batch: list[int] = []
    lengths = [len(prompt) + len(completion) for prompt, completion in passages]
    for i in sorted(range(len(passages)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def score(
    branches: Branches,
    passages: Sequence[Passage],
    strength: float,
    alpha: float,
    penalty: float,
    progress: str | None = None,
) -> list[float]:
    """log P of each completion, summed over its tokens, under the steered distribution."""
    totals = torch.zeros(len(passages), dtype=torch.float64)
    for logits, target, index in predictions(branches, passages, progress):
        adapted, base = logits[0], logits[-1]
        values = ops.score(adapted, base, target, strength, alpha=alpha, penalty=penalty)
        totals.index_add_(0, index, values.double().cpu())
    return totals.tolist()
