"""A checked call, and what comes of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from svd_engine.generation.logits_processors import LogitsProcess
from svd_engine.generation.sampling_params import SamplingParams
from svd_engine.model.pair import Decoder
from svd_engine.steering_config import SteeringConfig

# The best (token, log-probability) by distribution: steered, adapted, base.
Best = dict[str, list[tuple[int, float]]]


@dataclass
class Completion:
    """What one prompt became."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # under the distribution decoded
    finish_reason: str = "length"  # or "stop"
    stop_reason: int | str | None = None  # the id, kept in token_ids, or the string that ended it
    text: str = ""  # without special tokens, up to a stop string; empty without a tokenizer
    score: float | None = None  # of beam search: sum of logprobs / length ** length_penalty
    top_logprobs: list[Best] = field(default_factory=list)  # one a token, if asked for
    prompt_tokens: int = 0
    seconds_to_first_token: float = field(default=0.0, compare=False)  # both since the call
    seconds: float = field(default=0.0, compare=False)

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)


class Event(NamedTuple):
    """One token of one row of a stream."""

    row: int
    token_id: int
    logprob: float
    text: str  # what may be shown now; empty while a character or a stop string is incomplete
    finish_reason: str | None  # on the row's last token, with the reason to stop
    stop_reason: int | str | None = None
    top_logprobs: Best | None = None


@dataclass(frozen=True)
class Request:
    """A call, checked."""

    pair: Decoder
    model: str  # steered, or the name of the one model decoded
    steering: SteeringConfig
    prompts: list[list[int]]
    sampling: SamplingParams
    ends: set[int]
    stops: list[list[str]]  # of each prompt
    process: LogitsProcess | None
    text: Callable[[list[int]], str]
    batch_size: int

    def groups(self) -> Iterator[list[int]]:
        """Prompts that are decoded together, of like lengths; the longest first, so that the KV
        cache takes its size once."""
        rows = max(self.sampling.num_return_sequences, self.sampling.num_beams)
        size = max(1, self.batch_size // rows)
        order = sorted(range(len(self.prompts)), key=lambda i: -len(self.prompts[i]))
        yield from (sorted(order[i : i + size]) for i in range(0, len(order), size))
