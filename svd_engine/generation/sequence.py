"""One sequence: a prompt, the tokens decoded after it, and why they end."""

from collections.abc import Set
from dataclasses import dataclass, field

from svd_engine.generation.detokenizer import Detokenizer
from svd_engine.generation.outputs import Completion, Event, TopLogprobs


@dataclass(eq=False)
class Sequence:
    """One prompt with the tokens decoded so far.

    It is made when a request is validated, and is used for one decoding. The decode loop appends
    tokens; the sequence itself finds out when it is finished.
    """

    index: int  # its place among the request's sequences
    prompt_ids: list[int]
    max_new_tokens: int
    seed: int = 0
    eos_token_ids: Set[int] = frozenset()
    contrast_ids: list[int] | None = None  # what the base reads in the prompt's place
    detokenizer: Detokenizer | None = None  # None if its text is not needed
    is_text_incremental: bool = False  # decode text per token, instead of once at the end
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    text: str = ""
    score: float | None = None
    finish_reason: str | None = None  # "stop", "length" or "time"; None while it is running
    stop_reason: int | str | None = None
    seconds_to_first_token: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.max_new_tokens == 0:
            self.finish_reason = "length"

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def all_ids(self) -> list[int]:
        """Prompt and completion."""
        return self.prompt_ids + self.token_ids

    def append(
        self,
        token_id: int,
        logprob: float,
        top_logprobs: TopLogprobs | None = None,
        is_over: bool = False,
    ) -> Event:
        """Add one token, finish if it is the last, and return the token's event.

        is_over: there is no time for another one.
        """
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        if top_logprobs is not None:
            self.top_logprobs.append(top_logprobs)
        is_full = len(self.token_ids) == self.max_new_tokens
        stop_reason: int | str | None = token_id if token_id in self.eos_token_ids else None
        released = ""
        if self.is_text_incremental and self.detokenizer is not None:
            released = self.detokenizer.add(
                token_id, last=is_full or is_over or stop_reason is not None
            )
            self.text += released
            if self.detokenizer.stop_string is not None:
                stop_reason = self.detokenizer.stop_string
        if stop_reason is not None:
            self.finish("stop", stop_reason)
        elif is_full or is_over:
            self.finish("length" if is_full else "time")
        return Event(
            self.index, token_id, logprob, released, self.finish_reason, stop_reason, top_logprobs
        )

    def find_stop(self, token_ids: list[int]) -> int | str | None:
        """The end-of-sequence id or stop string that would end `token_ids`, tokens of a beam."""
        if token_ids[-1] in self.eos_token_ids:
            return token_ids[-1]
        if self.detokenizer is not None and self.detokenizer.stop_strings:
            return self.detokenizer.decode_to_stop(token_ids)[1]
        return None

    def finish(self, finish_reason: str, stop_reason: int | str | None = None) -> None:
        """End the sequence after its latest token."""
        self.finish_reason, self.stop_reason = finish_reason, stop_reason
        if self.detokenizer is not None and not self.is_text_incremental:
            self.text, _ = self.detokenizer.decode_to_stop(self.token_ids)

    def completion(self, model: str = "steered") -> Completion:
        return Completion(
            model=model,
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            finish_reason=self.finish_reason or "length",
            stop_reason=self.stop_reason,
            text=self.text,
            score=self.score,
            top_logprobs=self.top_logprobs,
            prompt_tokens=len(self.prompt_ids),
            seconds_to_first_token=self.seconds_to_first_token,
            seconds=self.seconds,
        )
