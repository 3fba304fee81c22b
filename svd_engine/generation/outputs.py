"""Results: Completion and Event of a request, whole and per token; Score of a given text."""

from dataclasses import dataclass, field
from typing import NamedTuple

# The best (token, log-probability) pairs per distribution: steered, adapted, base.
TopLogprobs = dict[str, list[tuple[int, float]]]


@dataclass
class Completion:
    """The completion of one prompt."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # under the distribution decoded
    finish_reason: str = "length"  # or "stop", or "time" after max_time
    stop_reason: int | str | None = None  # the id, kept in token_ids, or the string that ended it
    text: str = ""  # without special tokens, up to a stop string; empty without a tokenizer
    score: float | None = None  # of beam search: sum of logprobs / length ** length_penalty
    top_logprobs: list[TopLogprobs] = field(default_factory=list)  # per token, if requested
    model: str = "steered"  # or "adapted" or "base": the model decoded
    prompt_tokens: int = 0
    seconds_to_first_token: float = field(default=0.0, compare=False)  # both since the call
    seconds: float = field(default=0.0, compare=False)

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)


@dataclass
class Score:
    """How likely a continuation is under the distribution decoded."""

    token_ids: list[int]
    logprobs: list[float] = field(default_factory=list)  # of each token, in nats
    is_greedy: bool = True  # whether greedy decoding would write each of its tokens
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)  # if requested

    @property
    def logprob(self) -> float:
        return sum(self.logprobs)


class Event(NamedTuple):
    """One token of one row of a stream."""

    row: int
    token_id: int
    logprob: float
    text: str  # to show now; empty while a character or a stop string is incomplete
    finish_reason: str | None  # set on the row's last token only
    stop_reason: int | str | None = None
    top_logprobs: TopLogprobs | None = None
