"""What one request asks for: `extra_args` of its `SamplingParams`, `vllm_xargs` over HTTP."""

import math
from typing import Any, NamedTuple

from svd_engine.steering_config import SteeringConfig

MODELS = "base", "adapted", "steered"


class Choice(NamedTuple):
    """The model that a row of logits is of, an index of `MODELS`, and a steered one's strength."""

    model: int
    strength: float


def check(sampling_params: Any) -> None:
    """Raise ValueError for a strength or a model that cannot be."""
    extra = sampling_params.extra_args or {}
    strength, model = extra.get("strength"), extra.get("model")
    if strength is not None:
        if isinstance(strength, bool) or not isinstance(strength, int | float):
            raise ValueError(f"strength must be a number; got {strength!r}.")
        if not math.isfinite(strength):
            raise ValueError(f"strength must be finite; got {strength}.")
        if model not in (None, "steered"):
            raise ValueError(f"model={model!r} is decoded un-steered; leave out strength.")
    if model is not None and model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}; got {model!r}.")
    if sampling_params.prompt_logprobs is not None and (strength, model) != (None, None):
        raise ValueError(
            "prompt_logprobs are those of the engine's steering for ranking; leave out strength "
            "and model."
        )


def choose(extra_args: dict[str, Any] | None, default: SteeringConfig | None) -> Choice:
    """Return the choice of a request that `check` has let pass; default: the engine's steering."""
    extra = extra_args or {}
    strength, model = extra.get("strength"), extra.get("model")
    if strength is None:
        strength = 0.0 if default is None else default.strength
        model = model or ("adapted" if default is None else "steered")
    return Choice(MODELS.index(model or "steered"), float(strength))
