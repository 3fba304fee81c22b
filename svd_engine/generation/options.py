"""Typed keyword arguments of `generate`, `stream` and `astream`."""

from collections.abc import Sequence
from typing import Literal, TypedDict

from transformers import GenerationConfig, LogitsProcessor

from svd_engine.generation.inputs import Message
from svd_engine.steering_config import Steering, SteeringConfig


class SamplingOptions(TypedDict, total=False):
    """Arguments of `SamplingParams.from_arguments`: its fields, None where unset, and two more."""

    generation_config: GenerationConfig | None
    do_sample: bool | None
    max_new_tokens: int | None
    max_length: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | Sequence[int] | None
    num_beams: int | None
    length_penalty: float | None
    early_stopping: bool | Literal["never"] | None
    repetition_penalty: float | None
    num_return_sequences: int | None
    eos_token_id: int | Sequence[int] | None
    stop_strings: str | Sequence[str] | Sequence[Sequence[str] | None] | None
    top_logprobs: int | None


class GenerateOptions(SamplingOptions, total=False):
    """All options of one call; docs/engine.md describes each."""

    messages: Sequence[Message] | Sequence[Sequence[Message]] | None
    model: str | None
    steering: Steering | SteeringConfig | None
    logits_processor: Sequence[LogitsProcessor] | None
    batch_size: int
