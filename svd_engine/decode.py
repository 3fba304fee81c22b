"""The decoding loop: prefill, then one forward step and one operator call a token."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from svd_engine import checks, ops
from svd_engine.branches import Branches
from svd_engine.steering import SteeringConfig


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; `generate` documents the fields."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be >= 0; got {self.max_new_tokens}.")
        checks.sampling(self.temperature, self.top_k, self.top_p, self.min_p)


@torch.inference_mode()
def decode(
    pair: Branches,
    steering: SteeringConfig,
    rows: list[list[int]],
    sampling: Sampling,
    ends: set[int],
) -> Iterator[list[tuple[int, int, float]]]:
    """The loop: a step yields (row, token, logprob) of every row that has not ended before it."""
    if not rows or sampling.max_new_tokens == 0:
        return
    device = pair.device
    lengths = torch.tensor([len(row) for row in rows], device=device)
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    hidden = pair.prefill(tokens.to(device), lengths.tolist(), sampling.max_new_tokens)
    hidden = tuple(h[torch.arange(len(rows), device=device), lengths - 1] for h in hidden)
    seeds = torch.arange(sampling.seed, sampling.seed + len(rows), device=device)
    running = list(range(len(rows)))
    for count in range(sampling.max_new_tokens):
        logits = pair.logits(hidden)
        token, logprob = ops.sample(
            logits[0], logits[-1], steering.strength, alpha=steering.alpha,
            penalty=steering.penalty, temperature=sampling.temperature, top_k=sampling.top_k,
            top_p=sampling.top_p, min_p=sampling.min_p, seed=seeds, position=lengths + count,
        )  # fmt: skip
        drawn, logprobs = token.tolist(), logprob.tolist()
        for i in running:
            if drawn[i] < 0:
                raise ValueError(f"prompts[{i}]: the model's logits are not finite.")
        yield [(i, drawn[i], logprobs[i]) for i in running]
        running = [i for i in running if drawn[i] not in ends]
        if not running or count + 1 == sampling.max_new_tokens:
            return
        hidden = pair.step(token.clamp(min=0))  # a row that has ended may go astray
