"""Teacher forcing: what both models predict at every token of given completions."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from svd_engine import ops
from svd_engine.generation.distribution import Distribution, steered
from svd_engine.model.pair import ModelPair, PerModel
from svd_engine.model.runner import padded
from svd_engine.steering_config import SteeringConfig

BATCH_TOKENS = 2048  # positions whose keys and values are held at once
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
    branches: ModelPair, passages: Sequence[Passage], progress: str | None = None
) -> Iterator[Predictions]:
    """Every completion token of every passage once, a few positions at a time.

    A prompt that several completions follow is computed once. Memory does not grow with the number
    of passages: logits are made for `ROWS` positions at once.
    """
    with tqdm(total=len(passages), desc=progress, disable=progress is None, leave=False) as bar:
        for batch in _batches(passages):
            device = branches.device
            hidden = _hidden(branches, [passages[i] for i in batch])
            completions = [passages[i].completion for i in batch]
            places = [(r, c) for r, tokens in enumerate(completions) for c in range(len(tokens))]
            row, column = torch.tensor(places).T
            target = padded(completions)[row, column].to(device)
            index = torch.tensor(batch)[row]
            for part in torch.arange(len(places)).split(ROWS):
                logits = branches.logits([h[row[part], column[part]] for h in hidden])
                yield Predictions(logits, target[part], index[part])
            bar.update(len(batch))


def _hidden(branches: ModelPair, passages: Sequence[Passage]) -> PerModel:
    """Hidden states `[passages, n, H]` that predict token j of each completion at place j."""
    index = {prompt: i for i, prompt in enumerate(dict.fromkeys(tuple(p.prompt) for p in passages))}
    row = torch.tensor([index[tuple(p.prompt)] for p in passages], device=branches.device)
    fed = padded([p.completion[:-1] for p in passages]).to(branches.device)
    first = [h[row][:, None] for h in branches.prefill(list(index), fed.shape[1], len(row))]
    if fed.shape[1] == 0:
        return tuple(first)
    if len(index) < len(row):
        branches.reorder(row)
    return tuple(torch.cat(pair, 1) for pair in zip(first, branches.extend(fed), strict=True))


def _batches(passages: Sequence[Passage]) -> Iterator[list[int]]:
    """Indices, those of one prompt together; `BATCH_TOKENS` padded tokens a group at most."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, passage in enumerate(passages):
        by_prompt.setdefault(tuple(passage.prompt), []).append(i)
    batch: list[int] = []
    most = 0  # new tokens of a completion in the batch; prompts come sorted by length
    for prompt in sorted(by_prompt, key=len):
        for i in by_prompt[prompt]:
            most = max(most, len(passages[i].completion))
            if batch and (len(batch) + 1) * (len(prompt) + most) > BATCH_TOKENS:
                yield batch
                batch, most = [], len(passages[i].completion)
            batch.append(i)
    if batch:
        yield batch


def score(
    branches: ModelPair,
    passages: Sequence[Passage],
    steering: SteeringConfig,
    penalty: float,
    progress: str | None = None,
) -> list[float]:
    """log P of each completion, summed over its tokens; penalty: in place of the steering's."""
    totals = torch.zeros(len(passages), dtype=torch.float64)
    for logits, target, index in predictions(branches, passages, progress):
        values = scores(steered(logits, steering, penalty), target)
        totals.index_add_(0, index, values.double().cpu())
    return totals.tolist()


def scores(under: Distribution, target: Tensor) -> Tensor:
    """log P of the targets `[n]`."""
    return ops.score(*under.operands, target, **under.mask)
