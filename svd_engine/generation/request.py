"""A validated call of `generate` or `stream`."""

from collections.abc import Iterator
from dataclasses import dataclass

from svd_engine.generation.logits_processors import LogitsProcess
from svd_engine.generation.sampling_params import SamplingParams
from svd_engine.generation.sequence import Sequence
from svd_engine.model.pair import Decoder
from svd_engine.steering_config import SteeringConfig


@dataclass(frozen=True)
class Request:
    """A validated call: its sequences, and how all of them are decoded.

    sequences: num_return_sequences per prompt, side by side. model: "steered", or the name of the
    one model decoded.
    """

    decoder: Decoder
    steering: SteeringConfig
    sampling: SamplingParams
    sequences: list[Sequence]
    process_logits: LogitsProcess | None = None
    model: str = "steered"
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {self.batch_size}.")

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the steered distribution itself."""
        return self.process_logits is None

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
