"""From a request's body to a running stream."""

import secrets
from dataclasses import replace
from typing import Any

from starlette.exceptions import HTTPException

from svd_engine.engine import MODELS, SteeredEngine
from svd_engine.generation.outputs import Score
from svd_engine.generation.scheduler import BusyError, ClosedError
from svd_engine.generation.stream import Stream
from svd_engine.serve import errors, structured
from svd_engine.serve.schemas import ChatRequest, CompletionRequest, Message, Sampled
from svd_engine.serve.settings import Settings
from svd_engine.steering_config import SteeringConfig


def submit(
    engine: SteeredEngine, settings: Settings, asked: Sampled
) -> tuple[Stream, list[Score | None]]:
    """Submit what a body asks for; return the stream, and scores of the prompts if it wants them.

    Raises HTTPException: 400, 404, 429, 503.
    """
    model = _model(settings, asked.model)
    try:
        prompts = prompt_ids(engine, asked)
        options = _options(engine, settings, asked, prompts)
        stream = engine.submit(prompts, model=model, **options)
        try:
            return stream, _scores(engine, asked, model, prompts, options.get("steering"))
        except BaseException:
            stream.cancel()
            raise
    except (ValueError, TypeError) as error:
        raise HTTPException(400, str(error)) from error
    except BusyError as error:
        raise HTTPException(429, str(error)) from error
    except ClosedError as error:
        raise HTTPException(*errors.of(error)) from error


def prompt_ids(engine: SteeredEngine, asked: Any) -> list[list[int]]:
    """Token ids of the prompts, or of the conversation by the chat template."""
    messages = getattr(asked, "messages", None)
    if messages is not None:
        if not messages:
            raise ValueError("messages is empty; give at least one.")
        return engine.inputs.prompts(None, [_message(message) for message in messages])
    if not (found := engine.inputs.prompts(asked.prompt)):
        raise ValueError("prompt is empty; give at least one.")
    return found


def _scores(
    engine: SteeredEngine,
    asked: Sampled,
    model: str | None,
    prompts: list[list[int]],
    steering: SteeringConfig | None,
) -> list[Score | None]:
    """Of the prompts after their first token, for `echo` with `logprobs`; None for short ones."""
    scores: list[Score | None] = [None] * len(prompts)
    if isinstance(asked, CompletionRequest) and asked.echo and asked.logprobs is not None:
        long = [i for i, prompt in enumerate(prompts) if len(prompt) > 1]
        found = engine.score(
            [prompts[i] for i in long], model=model, steering=steering, details=True,
            top_logprobs=asked.logprobs,
        )  # fmt: skip
        for i, score in zip(long, found, strict=True):
            scores[i] = score
    return scores


def _message(message: Message) -> dict[str, str]:
    if unknown := [name for name, value in (message.model_extra or {}).items() if value]:
        raise ValueError(f"messages may hold role and content; got {', '.join(unknown)}.")
    parts = message.content
    if isinstance(parts, str):
        return {"role": message.role, "content": parts}
    if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in parts):
        raise ValueError("messages may hold parts of type text only.")
    return {"role": message.role, "content": "".join(part["text"] for part in parts)}


def _model(settings: Settings, name: str | None) -> str | None:
    if name is None or name == settings.name:
        return None
    if name not in MODELS:
        known = ", ".join((settings.name, *MODELS))
        raise HTTPException(404, f"the model {name!r} does not exist; there are {known}.")
    return name


def _options(
    engine: SteeredEngine, settings: Settings, asked: Sampled, prompts: list[list[int]]
) -> dict[str, Any]:
    options: dict[str, Any] = dict(
        max_new_tokens=_max_tokens(engine, settings, asked, prompts),
        temperature=asked.temperature, top_p=asked.top_p, top_k=asked.top_k, min_p=asked.min_p,
        repetition_penalty=asked.repetition_penalty, presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty, logit_bias=asked.logit_bias,
        num_return_sequences=asked.n,
        seed=secrets.randbits(62) if asked.seed is None else asked.seed,
        stop_strings=asked.stop or (), top_logprobs=_top_logprobs(asked),
        **structured.options(asked),
    )  # fmt: skip
    if asked.strength is not None or asked.alpha is not None:
        own = engine.steering.generation
        if own is None and asked.strength is None:
            raise ValueError("alpha needs a strength; the server has none of its own.")
        given = dict(strength=asked.strength, alpha=asked.alpha)
        changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        options["steering"] = replace(own or SteeringConfig(0.0), **changes)
    return options


def _max_tokens(
    engine: SteeredEngine, settings: Settings, asked: Sampled, prompts: list[list[int]]
) -> int:
    if isinstance(asked, ChatRequest):
        wanted = asked.max_completion_tokens or asked.max_tokens
    else:
        wanted = asked.max_tokens if isinstance(asked, CompletionRequest) else None
        wanted = 16 if wanted is None else wanted
    if wanted is not None and wanted > settings.max_tokens:
        raise ValueError(f"max_tokens may be at most {settings.max_tokens}; got {wanted}.")
    if wanted is not None:
        return wanted
    longest = engine.inputs.virtual_tokens + max(map(len, prompts))
    config: Any = engine.inputs.model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or engine.limits.tokens
    room = min(context, engine.limits.tokens // asked.n) - longest
    return max(1, min(settings.max_tokens, room))


def _top_logprobs(asked: Sampled) -> int:
    if isinstance(asked, ChatRequest):
        if asked.top_logprobs and not asked.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true.")
        return asked.top_logprobs or 0
    assert isinstance(asked, CompletionRequest)
    if asked.echo and asked.stream:
        raise ValueError("echo is not supported together with stream; leave one out.")
    return asked.logprobs or 0
