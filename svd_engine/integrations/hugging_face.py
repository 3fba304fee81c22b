"""Steered decoding through `model.generate` of Hugging Face transformers."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput

from svd_engine.generation.decode_loop import decode
from svd_engine.generation.sampling_params import SamplingParams
from svd_engine.integrations import generate_kwargs as arguments
from svd_engine.integrations.logits_processor import SteeringLogitsProcessor
from svd_engine.integrations.pair_cache import borrow
from svd_engine.steering_config import SteeringConfig

__all__ = ["SteeringLogitsProcessor", "steered_generate"]


def steered_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    steering: SteeringConfig | None = None,
    **prepared: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """For `model.generate(..., custom_generate=steered_generate, steering=SteeringConfig(...))`.

    model: a PeftModel, or one that transformers loaded an adapter into. Returns what `generate`
    does: the prompts followed by the new tokens, int64 `[R, n]`. Greedy or sampling, one forward
    pass a token for both models where they pair; `torch.manual_seed` decides what is drawn.
    Processors see the steered logits: `logits` are these, `scores` the processed. Stop strings go
    in as `stopping_criteria=[StopStringCriteria(tokenizer, strings)]`, because `generate` loses its
    tokenizer with a callable. ValueError names what is not supported; for beams there is
    `SteeringLogitsProcessor`.
    """
    if not isinstance(steering, SteeringConfig):
        raise ValueError(f"steering must be a SteeringConfig; got {steering!r}.")
    steering.check_vocabulary(model.config.get_text_config().vocab_size)
    arguments.check_supported(generation_config, prepared)
    mask, positions = prepared.get("attention_mask"), prepared.get("position_ids")
    prompts = arguments.prompts(input_ids, mask, positions)
    new_tokens, ends, criteria = arguments.stops(stopping_criteria, input_ids.shape[1])
    processors, draw = arguments.drawing(logits_processor, generation_config)
    sampling = SamplingParams(new_tokens, seed=int(torch.randint(2**62, ())), **draw)
    streamer = arguments.streamer()
    rows = Rows(input_ids, processors, generation_config)
    pad = generation_config._pad_token_tensor
    with borrow(model) as pair:
        for step in decode(pair, steering, prompts, sampling, ends, rows.process, rows.ended):
            tokens = [0 if pad is None else int(pad)] * len(prompts)
            for row, token, _ in step:
                tokens[row] = token
            new = rows.sequences.new_tensor(tokens)
            rows.sequences = torch.cat([rows.sequences, new[:, None]], 1)
            if streamer is not None:
                streamer.put(new.cpu())
            over = {row for row, token, _ in step if token in ends}
            if criteria:
                met = criteria(rows.sequences, rows.scores)
                over.update(met.nonzero()[:, 0].tolist())
            if len(over | rows.ended) == len(prompts):
                break
            if pad is not None:  # without one, rows go on until all are over
                rows.ended |= over
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return rows.sequences
    recorded: dict[str, Any] = dict(scores=rows.scores, logits=rows.logits)
    return GenerateDecoderOnlyOutput(sequences=rows.sequences, **recorded)


class Rows:
    """The text of every row, pads and all, and what processors make of the logits after it."""

    def __init__(
        self, input_ids: Any, processors: LogitsProcessorList, config: GenerationConfig
    ) -> None:
        self.sequences = input_ids
        self.ended: set[int] = set()
        record = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if record and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if record and config.output_logits else None
        self._processors = processors
        idle = not processors and self.scores is None and self.logits is None
        self.process = None if idle else self._process

    def _process(self, _: list[list[int]], steered: Tensor) -> Tensor:
        """The steered logits of the rows that have not ended, processed.

        Processors get all rows, as in transformers: they may know rows by their place.
        """
        running = [row for row in range(len(self.sequences)) if row not in self.ended]
        # What is handed out must not be bound to inference mode.
        with torch.inference_mode(False), torch.no_grad():
            every: Any = steered.new_zeros(len(self.sequences), steered.shape[1])
            every[running] = steered
            if self.logits is not None:
                self.logits += (every.clone(),)
            processed = self._processors(self.sequences, every)
            if self.scores is not None:
                self.scores += (processed,)
            return processed[running]
