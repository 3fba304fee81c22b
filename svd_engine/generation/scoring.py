"""Teacher forcing: the logits of both models at every token of given completions."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from svd_engine import ops
from svd_engine.generation.distribution import Distribution, steered
from svd_engine.generation.outputs import Score
from svd_engine.model.pair import ModelPair, PerModel
from svd_engine.model.runner import padded
from svd_engine.steering_config import SteeringConfig

BATCH_TOKENS = 2048  # positions whose keys and values are held at once
ROWS = 128  # positions whose `[ROWS, V]` logits are held at once


class Passage(NamedTuple):
    """A prompt and a completion to score."""

    prompt: list[int]
    completion: list[int]


class Predictions(NamedTuple):
    """Logits at `n` positions of some passages."""

    logits: tuple[Tensor, ...]  # adapted and base (or one model's), [n, V] each
    target: Tensor  # [n] int64
    passage: Tensor  # [n] int64, index of the passage


@torch.inference_mode()
def predictions(
    pair: ModelPair, passages: Sequence[Passage], progress: str | None = None
) -> Iterator[Predictions]:
    """Yield the logits at every completion token, a few positions at a time.

    A prompt shared by several completions is computed once. Memory does not grow with the number
    of passages: logits are computed for `ROWS` positions at once.
    """
    with tqdm(total=len(passages), desc=progress, disable=progress is None, leave=False) as bar:
        for batch in _batches(passages):
            device = pair.device
            hidden = _hidden(pair, [passages[i] for i in batch])
            completions = [passages[i].completion for i in batch]
            places = [(r, c) for r, tokens in enumerate(completions) for c in range(len(tokens))]
            row, column = torch.tensor(places).T
            target = padded(completions)[row, column].to(device)
            index = torch.tensor(batch)[row]
            for part in torch.arange(len(places)).split(ROWS):
                logits = pair.logits([h[row[part], column[part]] for h in hidden])
                yield Predictions(logits, target[part], index[part])
            bar.update(len(batch))


def _hidden(pair: ModelPair, passages: Sequence[Passage]) -> PerModel:
    """Hidden states `[passages, n, H]`; those at place j predict completion token j."""
    index = {prompt: i for i, prompt in enumerate(dict.fromkeys(tuple(p.prompt) for p in passages))}
    row = torch.tensor([index[tuple(p.prompt)] for p in passages], device=pair.device)
    fed = padded([p.completion[:-1] for p in passages]).to(pair.device)
    first = [h[row][:, None] for h in pair.prefill(list(index), fed.shape[1], len(row))]
    if fed.shape[1] == 0:
        return tuple(first)
    if len(index) < len(row):
        pair.reorder(row)
    return tuple(torch.cat(both, 1) for both in zip(first, pair.extend(fed), strict=True))


def _batches(passages: Sequence[Passage]) -> Iterator[list[int]]:
    """Group indices, with one prompt's together, into at most `BATCH_TOKENS` padded tokens."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, passage in enumerate(passages):
        by_prompt.setdefault(tuple(passage.prompt), []).append(i)
    batch: list[int] = []
    prompt_length = length = 0  # tokens of the longest prompt and completion in the batch
    # Most passages share their prompt, so that the completions' padding is what counts.
    for longest, prompt in sorted(
        (max(len(passages[i].completion) for i in group), prompt)
        for prompt, group in by_prompt.items()
    ):
        for i in by_prompt[prompt]:
            prompt_length, length = max(prompt_length, len(prompt)), max(length, longest)
            if batch and (len(batch) + 1) * (prompt_length + length) > BATCH_TOKENS:
                yield batch
                batch, prompt_length, length = [], len(prompt), longest
            batch.append(i)
    if batch:
        yield batch


def score(
    pair: ModelPair,
    passages: Sequence[Passage],
    steering: SteeringConfig,
    penalty: float,
    progress: str | None = None,
) -> list[float]:
    """log P of each completion, summed over its tokens.

    penalty: instead of the steering's.
    """
    totals = torch.zeros(len(passages), dtype=torch.float64)
    for logits, target, index in predictions(pair, passages, progress):
        values = scores(steered(logits, steering, penalty), target)
        totals.index_add_(0, index, values.double().cpu())
    return totals.tolist()


@torch.inference_mode()
def detailed(
    pair: ModelPair,
    passages: Sequence[Passage],
    steering: SteeringConfig,
    penalty: float,
    top_logprobs: int = 0,
) -> list[Score]:
    """`score` with its parts. Greedy is what decoding with the steering's own penalty is.

    top_logprobs: best tokens to list in the place of each.
    """
    found = [Score(list(passage.completion)) for passage in passages]
    for logits, target, index in predictions(pair, passages):
        scored, decoded = steered(logits, steering, penalty), steered(logits, steering)
        values = scores(scored, target)
        chosen = ops.sample(*decoded.operands, **decoded.mask).token == target
        for i, value, is_chosen in zip(
            index.tolist(), values.tolist(), chosen.tolist(), strict=True
        ):
            found[i].logprobs.append(value)
            found[i].is_greedy &= is_chosen
        if top_logprobs:
            best = ops.topk(*scored.operands, top_logprobs, **scored.mask)
            listed = zip(index.tolist(), best.token.tolist(), best.logprob.tolist(), strict=True)
            for i, tokens, logprobs in listed:
                found[i].top_logprobs.append([*zip(tokens, logprobs, strict=True)])
    return found


def scores(under: Distribution, target: Tensor) -> Tensor:
    """log P of the targets `[n]`."""
    return ops.score(*under.operands, target, **under.mask)
