"""A validated call of `generate` or `stream`."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

from svd_engine.generation.constrained import Constrain
from svd_engine.generation.logits_processors import LogitsProcess
from svd_engine.generation.prefix_cache import PrefixCache
from svd_engine.generation.sampling_params import SamplingParams
from svd_engine.generation.sequence import Sequence
from svd_engine.generation.speculation import Speculation
from svd_engine.model.pair import Decoder, PerModel
from svd_engine.steering_config import SteeringConfig
from svd_engine.utils.arguments import count


@dataclass(frozen=True)
class Request:
    """A validated call: its sequences, and how all of them are decoded.

    sequences: num_return_sequences per prompt, side by side. model: "steered", or the name of the
    one model decoded. deadline: on the clock of time.perf_counter.
    """

    decoder: Decoder
    steering: SteeringConfig
    sampling: SamplingParams
    sequences: list[Sequence]
    process_logits: LogitsProcess | None = None
    constrain: Constrain | None = None
    deadline: float = math.inf
    model: str = "steered"
    batch_size: int = 32
    speculation: Speculation | None = None
    prefix_cache: PrefixCache | None = None
    prefill_chunk: int | None = None  # the most tokens of a prompt that are read at once

    def __post_init__(self) -> None:
        count("batch_size", self.batch_size, 1)
        if self.prefill_chunk is not None:
            count("prefill_chunk", self.prefill_chunk, 1)

    @property
    def is_over(self) -> bool:
        """Whether the time of the request is over."""
        return self.deadline < time.perf_counter()

    def prefill(self, sequences: list[Sequence], max_rows: int) -> PerModel:
        """Hidden states at the end of each prompt of the sequences, whose copies share one."""
        firsts = sequences[:: self.sampling.num_return_sequences]
        contrast = [s.contrast_ids for s in firsts if s.contrast_ids is not None]
        guesses = 0 if self.speculation is None else self.speculation.most
        prompts = [s.prompt_ids for s in firsts]
        room = max(sequence.max_new_tokens for sequence in sequences) + guesses
        if self.prefix_cache is not None and not contrast:
            if beginnings := self.prefix_cache.find(self.decoder, prompts):
                chunk = self.prefill_chunk
                return self.decoder.resume(prompts, beginnings, room, max_rows, chunk)
        return self.decoder.prefill(prompts, room, max_rows, contrast or None, self.prefill_chunk)

    def keep(self, row: int, sequence: Sequence, hidden: PerModel) -> None:
        """Keep what a row of the decoder has read, for prompts that begin like it."""
        if self.prefix_cache is not None and sequence.contrast_ids is None:
            self.prefix_cache.keep(self.decoder, row, sequence, hidden)

    def groups(self) -> Iterator[list[Sequence]]:
        """Sequences to decode together, with prompts of similar lengths.

        The longest come first, so the KV cache is allocated once.
        """
        copies = self.sampling.num_return_sequences
        prompts = [self.sequences[i : i + copies] for i in range(0, len(self.sequences), copies)]
        size = max(1, self.batch_size // max(copies, self.sampling.num_beams))
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i][0].prompt_ids))
        for start in range(0, len(order), size):
            group = sorted(order[start : start + size])
            yield [sequence for i in group for sequence in prompts[i]]
