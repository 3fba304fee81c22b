"""Arguments that `generate` of transformers prepares for its loop, converted for ours."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer

# What `generate` hands to every loop and this one uses.
PREPARED = {"attention_mask", "position_ids", "streamer"}


def check_supported(config: GenerationConfig, prepared: dict[str, Any]) -> None:
    """Raise ValueError for a mode or an argument that is not supported."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"steered_generate decodes greedily or samples; the arguments ask for {mode.value}. "
            "SteeringLogitsProcessor steers any mode."
        )
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise ValueError(f"{name}=True is not supported by steered_generate; leave it out.")
    for name in prepared.keys() - PREPARED:
        value = prepared[name]
        if isinstance(value, Cache):  # its name depends on the version of transformers
            if value.get_seq_length():
                raise ValueError(f"{name} must be empty: give the whole text as input_ids.")
        # Numbers and switches say how `generate` computes; anything else is an input of the model.
        elif value is not None and not isinstance(value, bool | int | float):
            raise ValueError(f"{name} is not supported by steered_generate; give input_ids alone.")


def prompts(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> list[list[int]]:
    """Token ids of each row, without padding."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    mask = mask.bool()
    if input_ids.shape[1] == 0 or not mask.any(1).all():
        raise ValueError(f"input_ids {list(input_ids.shape)} has a row without tokens.")
    if position_ids is not None:
        expected = mask.cumsum(1) - 1
        if position_ids.dim() != 2 or ((position_ids != expected) & mask).any():
            raise ValueError("position_ids must count each row's tokens from 0; leave them out.")
    return [row[seen].tolist() for row, seen in zip(input_ids, mask, strict=True)]


def stopping(
    stopping_criteria: StoppingCriteriaList, width: int
) -> tuple[int, set[int], StoppingCriteriaList]:
    """max_new_tokens and end-of-sequence ids, for the loop, and the criteria to check per step."""
    max_lengths, eos_token_ids, others = [], set(), StoppingCriteriaList()
    for criterion in stopping_criteria:
        if type(criterion) is MaxLengthCriteria:
            max_lengths.append(criterion.max_length)
        elif type(criterion) is EosTokenCriteria:
            eos_token_ids.update(criterion.eos_token_id.tolist())
        else:
            others.append(criterion)
    return max(0, min(max_lengths) - width), eos_token_ids, others


def drawing(
    processors: LogitsProcessorList, config: GenerationConfig
) -> tuple[LogitsProcessorList, dict[str, Any]]:
    """The processors to run, and the sampling parameters to apply after them.

    If temperature and cuts come last among the processors, our own sampling applies them, unless
    the scores after them are requested.
    """
    if not config.do_sample:
        return processors, {}
    made: dict[type, bool] = {
        TemperatureLogitsWarper: config.temperature not in (None, 1.0),
        TopKLogitsWarper: config.top_k not in (None, 0),
        TopPLogitsWarper: config.top_p is not None and config.top_p < 1,
        MinPLogitsWarper: config.min_p is not None,
    }
    own = [warper for warper, present in made.items() if present]
    rest = len(processors) - len(own)
    recorded = config.return_dict_in_generate and config.output_scores
    if recorded or [type(processor) for processor in processors[rest:]] != own:
        return processors, dict(temperature=1.0)
    return LogitsProcessorList(processors[:rest]), dict(
        temperature=1.0 if config.temperature is None else config.temperature,
        top_k=config.top_k or 0,
        top_p=1.0 if config.top_p is None else config.top_p,
        min_p=config.min_p or 0.0,
    )


def streamer() -> BaseStreamer | None:
    """The streamer passed to the running `generate`, which does not hand it to a callable."""
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("streamer")
