"""The decoding loop: prefill, then one forward step and one operator call a token."""

from collections.abc import Callable, Iterator, Set

import torch

from svd_engine import ops
from svd_engine.generation import distribution
from svd_engine.generation.distribution import Distribution
from svd_engine.generation.logits_processors import LogitsProcess
from svd_engine.generation.sampling_params import SamplingParams
from svd_engine.model import cuda_graphs
from svd_engine.model.pair import Decoder, PerModel
from svd_engine.steering_config import SteeringConfig

# (rows of the step, logits of the models, the distribution drawn from)
Observe = Callable[[list[int], PerModel, Distribution], None]


@torch.inference_mode()
def decode(
    pair: Decoder,
    steering: SteeringConfig,
    rows: list[list[int]],
    sampling: SamplingParams,
    ends: set[int],
    process: LogitsProcess | None = None,
    stopped: Set[int] = frozenset(),
    observe: Observe | None = None,
) -> Iterator[list[tuple[int, int, float]]]:
    """The loop: a step yields (row, token, logprob) of every row that has not ended before it.

    rows: prompts; with num_return_sequences n, prompt i becomes rows i * n to i * n + n - 1.
    process: changes the steered logits that a token is drawn from. stopped: rows that the caller
    has found to be at their end, looked at after every step.
    """
    copies = sampling.num_return_sequences
    limits = [sampling.limit(len(row)) for row in rows for _ in range(copies)]
    if max(limits, default=0) == 0:
        return
    hidden, device = pair.prefill(rows, max(limits), len(limits)), pair.device
    if copies > 1:
        spread = torch.arange(len(rows), device=device).repeat_interleave(copies)
        pair.reorder(spread)
        hidden = tuple(h[spread] for h in hidden)
    logits = pair.logits(hidden)
    so_far = [list(row) for row in rows for _ in range(copies)]
    running = list(range(len(so_far)))
    seeds = [seed + copy for seed in sampling.seeds(len(rows)) for copy in range(copies)]
    seed = torch.tensor(seeds, device=device)
    position = torch.tensor([len(row) for row in so_far], device=device)
    ending = [len(row) + limit for row, limit in zip(so_far, limits, strict=True)]
    while True:
        tokens = [so_far[i] for i in running] if process else []
        drawn_from = _distribution(logits, steering, process, tokens)
        token, logprob = ops.sample(
            *drawn_from.operands, **drawn_from.mask, temperature=sampling.temperature,
            top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p, seed=seed,
            position=position,
        )  # fmt: skip
        if observe is not None:
            observe(running, logits, drawn_from)
        fetch = cuda_graphs.read(token, logprob)
        more = any(len(so_far[i]) + 1 < ending[i] for i in running)
        # The device goes on while the host looks at the tokens.
        if ahead := pair.overlaps_host and more:
            logits = pair.step(token.clamp(min=0))
        step = list(zip(running, *fetch(), strict=True))
        for i, drawn, _ in step:
            if drawn < 0:
                raise not_finite(so_far[i])
            so_far[i].append(drawn)
        yield step
        on = [
            k
            for k, (i, drawn, _) in enumerate(step)
            if drawn not in ends and i not in stopped and len(so_far[i]) < ending[i]
        ]
        if not on:
            return
        position = position + 1
        if len(on) < len(running):  # rows that have ended leave the batch
            index = torch.tensor(on, device=device)
            pair.reorder(index)
            token, seed, position = token[index], seed[index], position[index]
            logits = tuple(x[index] for x in logits) if ahead else logits
            running = [running[k] for k in on]
        if not ahead:
            logits = pair.step(token)


def not_finite(tokens: list[int]) -> ValueError:
    return ValueError(f"the model's logits are not finite after the tokens ... {tokens[-8:]}.")


def _distribution(
    logits: PerModel,
    steering: SteeringConfig,
    process: LogitsProcess | None,
    tokens: list[list[int]],
) -> Distribution:
    """The steered distribution, after `process` where there is one."""
    if process is None:
        return distribution.steered(logits, steering)
    processed = process(tokens, distribution.steered_logits(logits, steering))
    if processed.isneginf().all(1).any():
        raise ValueError(
            "logits_processor removed every token that steering left to a row. Steer with alpha=0 "
            "or a finite penalty where tokens are constrained."
        )
    return distribution.unsteered(processed)
