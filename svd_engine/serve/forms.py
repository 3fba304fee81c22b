"""Answers in the forms of OpenAI's two endpoints, whole and in chunks."""

import time
import uuid
from typing import Any

from transformers import PreTrainedTokenizerBase

from svd_engine.generation.outputs import Completion, Event
from svd_engine.generation.request import Request
from svd_engine.serve.schemas import ChatRequest, CompletionRequest


class Form:
    """Shapes the answer of one request."""

    def __init__(
        self,
        asked: ChatRequest | CompletionRequest,
        request: Request,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
    ) -> None:
        self._asked, self._request, self._tokenizer = asked, request, tokenizer
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
        self._begun: set[int] = set()
        self._offsets: dict[int, int] = {}

    def whole(self, events: list[list[Event]], completions: list[Completion]) -> dict:
        """The answer; events: of each sequence."""
        choices = []
        for row, completion in enumerate(completions):
            choice: dict[str, Any] = dict(index=row, finish_reason=completion.finish_reason)
            choice["logprobs"] = self._logprobs(row, events[row])
            if self._is_chat:
                choice["message"] = dict(role="assistant", content=completion.text)
            else:
                choice["text"] = self._echoed(row) + completion.text
            choices.append(choice)
        return dict(self._head, choices=choices, usage=self.usage())

    def chunk(self, event: Event) -> dict:
        """What one event adds."""
        choice: dict[str, Any] = dict(index=event.row, finish_reason=event.finish_reason)
        choice["logprobs"] = self._logprobs(event.row, [event])
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
        if not getattr(self._asked, "echo", False):
            return ""
        prompt: Any = self._request.sequences[row].prompt_ids
        return str(self._tokenizer.decode(prompt, skip_special_tokens=True))

    def _logprobs(self, row: int, events: list[Event]) -> dict | None:
        if not self._has_logprobs:
            return None
        listed = [(event.top_logprobs or {}).get(self._request.model, []) for event in events]
        if self._is_chat:
            content = [
                dict(
                    self._token(event.token_id, event.logprob),
                    top_logprobs=[self._token(*pair) for pair in best],
                )
                for event, best in zip(events, listed, strict=True)
            ]
            return dict(content=content, refusal=None)
        texts = [self._text(event.token_id) for event in events]
        offset, offsets = self._offsets.get(row, 0), []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        self._offsets[row] = offset
        return dict(
            tokens=texts,
            token_logprobs=[_finite(event.logprob) for event in events],
            top_logprobs=[{self._text(t): _finite(x) for t, x in best} for best in listed],
            text_offset=offsets,
        )

    def _token(self, token_id: int, logprob: float) -> dict:
        text = self._text(token_id)
        return dict(token=text, logprob=_finite(logprob), bytes=list(text.encode()))

    def _text(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id]))


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI's API writes this number for it."""
    return max(logprob, -9999.0)
