"""Answers in the forms of OpenAI's two endpoints, whole and in chunks."""

import time
import uuid
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from svd_engine.generation.outputs import Completion, Event, Score
from svd_engine.generation.request import Request
from svd_engine.serve.schemas import ChatRequest, CompletionRequest


class Place(NamedTuple):
    """A token of a text, how likely it was, and the best tokens in its place."""

    token_id: int
    logprob: float | None  # None of a prompt's first token
    best: list[tuple[int, float]] | None


class Form:
    """Shapes the answer of one request. scores: of its prompts, where they are echoed."""

    def __init__(
        self,
        asked: ChatRequest | CompletionRequest,
        request: Request,
        scores: list[Score | None],
        tokenizer: PreTrainedTokenizerBase,
        name: str,
    ) -> None:
        self._asked, self._request, self._tokenizer = asked, request, tokenizer
        self._scores = scores
        self._is_chat = isinstance(asked, ChatRequest)
        kind = "chat.completion" if self._is_chat else "text_completion"
        prefix = "chatcmpl" if self._is_chat else "cmpl"
        self._head = dict(
            id=f"{prefix}-{uuid.uuid4().hex}", object=kind, created=int(time.time()), model=name
        )
        wanted: Any = asked.logprobs
        self._has_logprobs = wanted is not None and wanted is not False
        options = asked.stream_options
        self.has_usage = options is not None and options.include_usage
        self._echoes = isinstance(asked, CompletionRequest) and asked.echo
        self._begun: set[int] = set()
        self._offsets: dict[int, int] = {}

    def whole(self, events: list[list[Event]], completions: list[Completion]) -> dict:
        """The answer; events: of each sequence."""
        choices = []
        for row, completion in enumerate(completions):
            choice: dict[str, Any] = dict(index=row, finish_reason=completion.finish_reason)
            choice["logprobs"] = self._logprobs(row, self._prompt(row) + self._places(events[row]))
            if self._is_chat:
                choice["message"] = dict(role="assistant", content=completion.text)
            else:
                choice["text"] = self._echoed(row) + completion.text
            choices.append(choice)
        return dict(self._head, choices=choices, usage=self.usage())

    def chunk(self, event: Event) -> dict:
        """What one event adds."""
        choice: dict[str, Any] = dict(index=event.row, finish_reason=event.finish_reason)
        choice["logprobs"] = self._logprobs(event.row, self._places([event]))
        if not self._is_chat:
            choice["text"] = event.text
            return dict(self._head, choices=[choice])
        choice["delta"] = dict(content=event.text)
        if event.row not in self._begun:
            self._begun.add(event.row)
            choice["delta"] = dict(role="assistant", content=event.text)
        return dict(self._head, object="chat.completion.chunk", choices=[choice])

    def last_chunk(self) -> dict:
        """The usage, after all others."""
        kind = "chat.completion.chunk" if self._is_chat else self._head["object"]
        return dict(self._head, object=kind, choices=[], usage=self.usage())

    def usage(self) -> dict[str, int]:
        sequences = self._request.sequences
        prompts = sequences[:: self._request.sampling.num_return_sequences]
        prompt = sum(len(sequence.prompt_ids) for sequence in prompts)
        completion = sum(len(sequence.token_ids) for sequence in sequences)
        return dict(
            prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
        )

    def _echoed(self, row: int) -> str:
        return self._shown(self._request.sequences[row].prompt_ids) if self._echoes else ""

    def _prompt(self, row: int) -> list[Place]:
        """The places of an echoed prompt."""
        if not self._echoes:
            return []
        score = self._scores[row // self._request.sampling.num_return_sequences]
        places = [Place(self._request.sequences[row].prompt_ids[0], None, None)]
        if score is not None:
            best = score.top_logprobs or [[]] * len(score.token_ids)
            places += map(Place, score.token_ids, score.logprobs, best)
        return places

    def _places(self, events: list[Event]) -> list[Place]:
        model = self._request.model
        return [Place(e.token_id, e.logprob, (e.top_logprobs or {}).get(model, [])) for e in events]

    def _logprobs(self, row: int, places: list[Place]) -> dict | None:
        if not self._has_logprobs:
            return None
        if self._is_chat:
            content = [
                dict(
                    self._token(place.token_id, place.logprob),
                    top_logprobs=[self._token(*pair) for pair in place.best or ()],
                )
                for place in places
            ]
            return dict(content=content, refusal=None)
        offset, offsets = self._offsets.get(row, 0), []
        for place in places:
            offsets.append(offset)
            offset += len(self._shown([place.token_id]))
        self._offsets[row] = offset
        return dict(
            tokens=[self._text(place.token_id) for place in places],
            token_logprobs=[_finite(place.logprob) for place in places],
            top_logprobs=[self._best(place.best) for place in places],
            text_offset=offsets,
        )

    def _best(self, best: list[tuple[int, float]] | None) -> dict | None:
        return None if best is None else {self._text(t): _finite(x) for t, x in best}

    def _shown(self, token_ids: list[int]) -> str:
        """Their text without special tokens, as completions have it."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    def _token(self, token_id: int, logprob: float | None) -> dict:
        text = self._text(token_id)
        return dict(token=text, logprob=_finite(logprob), bytes=list(text.encode()))

    def _text(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id]))


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity; OpenAI's API writes this number for it."""
    return None if logprob is None else max(logprob, -9999.0)
