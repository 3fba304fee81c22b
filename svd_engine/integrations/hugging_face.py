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

from svd_engine.generation.decode_loop import Batch
from svd_engine.generation.outputs import Event
from svd_engine.generation.request import Request
from svd_engine.generation.sampling_params import SamplingParams
from svd_engine.generation.sequence import Sequence
from svd_engine.integrations import generate_kwargs as arguments
from svd_engine.integrations.logits_processor import SteeringLogitsProcessor
from svd_engine.integrations.pair_cache import borrow
from svd_engine.model.layers import longrope
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
    does: the prompts followed by the new tokens, int64 `[R, n]`. It decodes greedily or samples,
    with one forward pass per token for both models if they pair; `torch.manual_seed` seeds the
    sampling. Processors see the steered logits: `logits` are these, `scores` the processed ones.
    Pass stop strings as `stopping_criteria=[StopStringCriteria(tokenizer, strings)]`, because
    `generate` does not hand its tokenizer to a callable. Raises ValueError for what is not
    supported; for beams use `SteeringLogitsProcessor`.
    """
    if not isinstance(steering, SteeringConfig):
        raise ValueError(f"steering must be a SteeringConfig; got {steering!r}.")
    steering.check_vocabulary(model.config.get_text_config().vocab_size)
    arguments.check_supported(generation_config, prepared)
    mask, positions = prepared.get("attention_mask"), prepared.get("position_ids")
    prompts = arguments.prompts(input_ids, mask, positions)
    max_new_tokens, eos_token_ids, criteria = arguments.stopping(
        stopping_criteria, input_ids.shape[1]
    )
    processors, draw = arguments.drawing(logits_processor, generation_config)
    sampling, seed = SamplingParams(**draw), int(torch.randint(2**62, ()))
    sequences = [
        Sequence(row, prompt, max_new_tokens, seed + row, eos_token_ids)
        for row, prompt in enumerate(prompts)
    ]
    streamer = arguments.streamer()
    output = Output(input_ids, sequences, processors, generation_config)
    for row, prompt in enumerate(prompts):
        total = len(prompt) + max_new_tokens
        longrope.check_constant(f"row {row}", model.config, len(prompt), total)
    with borrow(model) as pair:
        process_logits = output.process_logits if output.needs_logits else None
        batch = Batch(Request(pair, steering, sampling, sequences, process_logits), sequences)
        while not batch.is_finished:
            new = output.append(batch.step())
            if streamer is not None:
                streamer.put(new.cpu())
            if criteria:
                output.stop(criteria(output.input_ids, output.scores))
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return output.input_ids
    recorded: dict[str, Any] = dict(scores=output.scores, logits=output.logits)
    return GenerateDecoderOnlyOutput(sequences=output.input_ids, **recorded)


class Output:
    """The output of `generate`, with pads, and its processors and stopping criteria per step."""

    def __init__(
        self,
        input_ids: Any,
        sequences: list[Sequence],
        processors: LogitsProcessorList,
        config: GenerationConfig,
    ) -> None:
        self.input_ids = input_ids  # [R, n]; a column is added per step
        record = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if record and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if record and config.output_logits else None
        self._sequences, self._processors = sequences, processors
        pad = config._pad_token_tensor
        self._pad_token_id = None if pad is None else int(pad)

    @property
    def needs_logits(self) -> bool:
        return bool(self._processors) or self.scores is not None or self.logits is not None

    def append(self, step: list[Event]) -> Tensor:
        """Add a step's tokens, and pads to finished sequences; return them, `[R]`."""
        tokens = [self._pad_token_id or 0] * len(self._sequences)
        for event in step:
            tokens[event.row] = event.token_id
        new = self.input_ids.new_tensor(tokens)
        self.input_ids = torch.cat([self.input_ids, new[:, None]], 1)
        return new

    def stop(self, met: Tensor) -> None:
        """Finish the sequences whose stopping criteria are met, bool `[R]`.

        Without a pad token they finish only all at once.
        """
        ended = [
            sequence.is_finished or over
            for sequence, over in zip(self._sequences, met.tolist(), strict=True)
        ]
        if self._pad_token_id is None and not all(ended):
            return
        for sequence, over in zip(self._sequences, ended, strict=True):
            if over and not sequence.is_finished:
                sequence.finish("stop")

    def process_logits(self, _: list[list[int]], steered: Tensor) -> Tensor:
        """Process the steered logits of the sequences that are not finished.

        Processors get all rows, as in transformers: they may know rows by their place.
        """
        running = [sequence.index for sequence in self._sequences if not sequence.is_finished]
        # Tensors handed to the caller must not be inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            every: Any = steered.new_zeros(len(self._sequences), steered.shape[1])
            every[running] = steered
            if self.logits is not None:
                self.logits += (every.clone(),)
            processed = self._processors(self.input_ids, every)
            if self.scores is not None:
                self.scores += (processed,)
            return processed[running]
