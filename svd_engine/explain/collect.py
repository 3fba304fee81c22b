"""What the page shows: three answers to each prompt, and both models' view of every token."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from svd_engine import ops
from svd_engine.engine import SteeredEngine
from svd_engine.generation.distribution import unsteered
from svd_engine.generation.scoring import Passage, Predictions, predictions
from svd_engine.steering_config import SteeringConfig

SHOWN = ("base", "adapted", "steered")
TOP = 4  # tokens listed of each model
MOST_ENTRIES = 2_000_000  # tokens of all supports, ten bytes each


@dataclass
class Position:
    """One token of an answer, given the tokens before it."""

    token: int
    divergence: float  # KL(p || q)
    support: list[tuple[int, float, float]]  # token, p, delta; the most probable first
    adapted: list[tuple[int, float]]  # the most probable tokens, and p
    base: list[tuple[int, float]]  # the same of the base, and q


@dataclass
class Answer:
    """The greedy answer of one model."""

    model: str
    finish_reason: str
    positions: list[Position] = field(default_factory=list)


def check(steering: SteeringConfig | None) -> SteeringConfig:
    """Raise ValueError unless supports say everything about this steering."""
    if steering is None:
        raise ValueError(
            "the adapter has no steering_config.json; run svd-engine calibrate or give --strength."
        )
    if steering.penalty != -np.inf:
        raise ValueError(
            f"explain shows steering that removes tokens off the support; got penalty = "
            f"{steering.penalty}. Leave the penalty at -inf."
        )
    if steering.alpha == 0:
        raise ValueError("alpha = 0 steers the whole vocabulary; give an alpha such as 0.01.")
    return steering


@torch.inference_mode()
def collect(
    engine: SteeredEngine, prompts: Sequence[list[int]], max_new_tokens: int, progress: bool = False
) -> list[list[Answer]]:
    """Return the answers of `SHOWN` to each prompt, in token ids. Raises ValueError.

    Both models read every answer once more, each token given those before it.
    """
    steering = check(engine.steering.generation)
    answers, passages = [], []
    for model in SHOWN:
        completions = engine.generate(
            prompts, model=model, max_new_tokens=max_new_tokens, progress=progress
        )
        for prompt, completion in zip(prompts, completions, strict=True):
            answers.append(Answer(model, completion.finish_reason))
            passages.append(Passage(prompt, completion.token_ids))
    entries = 0
    for predicted in predictions(engine.pair, passages, "explaining" if progress else None):
        positions = _positions(predicted, steering)
        entries += sum(len(position.support) for position in positions)
        if entries > MOST_ENTRIES:
            raise ValueError(
                f"the supports hold more than {MOST_ENTRIES} tokens at alpha = {steering.alpha}: "
                "give a larger alpha, fewer prompts or fewer tokens."
            )
        for i, position in zip(predicted.passage.tolist(), positions, strict=True):
            answers[i].positions.append(position)
    return [answers[i :: len(prompts)] for i in range(len(prompts))]


def _positions(predicted: Predictions, steering: SteeringConfig) -> list[Position]:
    adapted, base = predicted.logits[0], predicted.logits[-1]
    listed = ops.support(
        adapted, base, predicted.target, alpha=steering.alpha, direction=steering.direction
    )
    columns = zip(
        predicted.target.tolist(), listed.divergence.tolist(), listed.token.tolist(),
        listed.p.tolist(), listed.delta.tolist(), _top(adapted), _top(base), strict=True,
    )  # fmt: skip
    return [
        Position(
            target,
            max(0.0, divergence),
            sorted(
                (entry for entry in zip(token, p, delta, strict=True) if entry[0] >= 0),
                key=lambda entry: (-entry[1], entry[0]),
            ),
            *tops,
        )
        for target, divergence, token, p, delta, *tops in columns
    ]


def _top(logits: torch.Tensor) -> list[list[tuple[int, float]]]:
    alone = unsteered(logits)
    best = ops.topk(*alone.operands, min(TOP, logits.shape[1]), **alone.mask)
    rows = zip(best.token.tolist(), best.logprob.exp().tolist(), strict=True)
    return [list(zip(tokens, values, strict=True)) for tokens, values in rows]
