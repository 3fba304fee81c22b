"""A look at the texts that a strength makes, before it is used."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from svd_engine.generation.outputs import Completion
from svd_engine.steering_config import SteeringConfig

PROMPTS, TOKENS = 4, 24


@dataclass(frozen=True)
class TextCheck:
    """Greedy answers of base, adapted and steered to the same prompts."""

    answers: list[dict[str, str]]  # of each prompt, by model
    changed: float  # share of the steered tokens that the adapted model does not have there
    distinct: dict[str, tuple[float, float]]  # distinct-1 and distinct-2 by model


def check(
    generate: Callable[..., list[Completion]],
    prompts: Sequence[list[int]],
    steering: SteeringConfig,
) -> TextCheck:
    """Answer the prompts with each model. generate: that of an engine."""
    made = {
        "base": generate(prompts, model="base", max_new_tokens=TOKENS),
        "adapted": generate(prompts, model="adapted", max_new_tokens=TOKENS),
        "steered": generate(prompts, steering=steering, max_new_tokens=TOKENS),
    }
    tokens = {model: [c.token_ids for c in completions] for model, completions in made.items()}
    return TextCheck(
        answers=[
            {model: completions[i].text.strip() for model, completions in made.items()}
            for i in range(len(prompts))
        ],
        changed=_changed(tokens["adapted"], tokens["steered"]),
        distinct={
            model: (_distinct(each, 1), _distinct(each, 2)) for model, each in tokens.items()
        },
    )


def _changed(before: list[list[int]], after: list[list[int]]) -> float:
    """The share of tokens of `after` that `before` does not have at the same place."""
    texts = zip(before, after, strict=True)
    kept = sum(a == b for one, other in texts for a, b in zip(one, other, strict=False))
    return 1 - kept / sum(map(len, after))


def _distinct(texts: list[list[int]], n: int) -> float:
    """Distinct-n: the share of different n-grams among all of the texts; 1 if there are none."""
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
