"""Typed keyword arguments of `generate`, `stream`, `astream` and `score`."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from transformers import GenerationConfig, LogitsProcessor

from svd_engine.generation.constraints import AllowedTokens
from svd_engine.generation.inputs import Message
from svd_engine.steering_config import Steering, SteeringConfig


class SamplingOptions(TypedDict, total=False):
    """Arguments of `SamplingParams.from_arguments`: its fields, None where unset, and two more."""

    generation_config: GenerationConfig | None
    do_sample: bool | None
    max_new_tokens: int | None
    max_length: int | None
    max_time: float | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | Sequence[int] | None
    num_beams: int | None
    length_penalty: float | None
    early_stopping: bool | Literal["never"] | None
    min_new_tokens: int | None
    min_length: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    no_repeat_ngram_size: int | None
    bad_words_ids: Sequence[Sequence[int]] | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | Sequence[int] | None
    sequence_bias: Mapping[tuple[int, ...], float] | Sequence[Any] | None
    logit_bias: Mapping[int, float] | None
    prefix_allowed_tokens_fn: AllowedTokens | None
    regex: str | None
    json_schema: Mapping[str, Any] | str | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    num_return_sequences: int | None
    eos_token_id: int | Sequence[int] | None
    stop_strings: str | Sequence[str] | Sequence[Sequence[str] | None] | None
    top_logprobs: int | None


class GenerateOptions(SamplingOptions, total=False):
    """All options of one call; docs/engine.md describes each."""

    messages: Sequence[Message] | Sequence[Sequence[Message]] | None
    contrast: Any
    model: str | None
    steering: Steering | SteeringConfig | None
    logits_processor: Sequence[LogitsProcessor] | None
    batch_size: int
    speculate: Any
    prefill_chunk: int | None


class ScoreOptions(TypedDict, total=False):
    """Options of `score`."""

    messages: Any
    penalty: float
    model: str | None
    steering: Steering | SteeringConfig | None
    top_logprobs: int
