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
    """Some positions of some sequences, `n` of them."""

    logits: tuple[Tensor, ...]  # adapted and base (or one model's), [n, V] each
    target: Tensor  # [n] int64
    sequence: Tensor  # [n] int64, index of the sequence


@torch.inference_mode()
def predictions(
    branches: Branches, sequences: Sequence[Passage], progress: str | None = None
) -> Iterator[Predictions]:
    """Every completion token of every passage once, a few positions at a time.

    Memory does not grow with the number of sequences: logits are made for `ROWS` positions at once.
    """
    with tqdm(total=len(sequences), desc=progress, disable=progress is None, leave=False) as bar:
        for batch in _batches(sequences):
            device = branches.device
            lengths = [len(sequences[i].prompt) + len(sequences[i].completion) for i in batch]
            tokens = torch.zeros(len(batch), max(lengths), dtype=torch.int64)
            rows, columns, indices = [], [], []
            for row, i in enumerate(batch):
                prompt, completion = sequences[i]
                tokens[row, : lengths[row]] = torch.tensor(prompt + completion)
                columns += range(len(prompt) - 1, lengths[row] - 1)
                rows += [row] * len(completion)
                indices += [i] * len(completion)
            row, column = torch.tensor(rows), torch.tensor(columns)
            target, index = tokens[row, column + 1].to(device), torch.tensor(indices)
            hidden = branches.prefill(tokens.to(device), lengths)
            for part in torch.arange(len(rows)).split(ROWS):
                logits = branches.logits([h[row[part], column[part]] for h in hidden])
                yield Predictions(logits, target[part], index[part])
            bar.update(len(batch))


def _batches(sequences: Sequence[Passage]) -> Iterator[list[int]]:
    """Indices grouped by length, `BATCH_TOKENS` padded tokens a group at most."""
    batch: list[int] = []
    order = sorted(range(len(sequences)), key=lambda i: len(sum(sequences[i], [])))
    for i in order:
        if batch and (len(batch) + 1) * len(sum(sequences[i], [])) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def score(
    branches: Branches,
    sequences: Sequence[Passage],
    strength: float,
    alpha: float,
    penalty: float,
    progress: str | None = None,
) -> list[float]:
    """log P of each completion, summed over its tokens, under the steered distribution."""
    totals = torch.zeros(len(sequences), dtype=torch.float64)
    for logits, target, index in predictions(branches, sequences, progress):
        adapted, base = logits[0], logits[-1]
        values = ops.score(adapted, base, target, strength, alpha=alpha, penalty=penalty)
        totals.index_add_(0, index, values.double().cpu())
    return totals.tolist()
