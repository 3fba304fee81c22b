"""Validate a call's inputs, and turn them into token ids and sequences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from svd_engine.data.checks import check_messages
from svd_engine.data.tokenization import (
    Text,
    as_list,
    encode_chat,
    encode_prompt,
    is_chat,
    located,
    token_ids,
)
from svd_engine.generation import sequence
from svd_engine.generation.detokenizer import Detokenizer, special_in
from svd_engine.generation.sampling_params import SamplingParams
from svd_engine.generation.scoring import Passage
from svd_engine.model.layers import longrope
from svd_engine.utils.arguments import count

Prompt = Text
Message = Mapping[str, str]  # role and content


@dataclass
class Inputs:
    """Validates inputs against one model; every method raises ValueError before any work."""

    model: PreTrainedModel  # the adapted model, or the base under its adapter
    tokenizer: PreTrainedTokenizerBase | None
    virtual_tokens: int = 0  # of the adapter, before every prompt
    base: PreTrainedModel | None = None  # if it is another model

    @property
    def vocab_size(self) -> int:
        return self.model.config.get_text_config().vocab_size

    def prompts(
        self,
        prompts: Prompt | Sequence[Prompt] | None,
        messages: Sequence[Message] | Sequence[Sequence[Message]] | None = None,
    ) -> list[list[int]]:
        """Token ids of each prompt or, by the tokenizer's chat template, of each conversation."""
        if (prompts is None) == (messages is None):
            raise ValueError("give prompts or messages, one of the two.")
        encoded = self._conversations(messages) if messages is not None else self._texts(prompts)
        for i, ids in enumerate(encoded):
            if not ids:
                raise ValueError(f"prompts[{i}] is empty; give at least one token.")
            self._check_ids(f"prompts[{i}]", ids)
        return encoded

    def contrast(self, contrast: Any, are_messages: bool, count: int) -> list[list[int]]:
        """Token ids that the base reads in the place of each of `count` prompts.

        One contrast is that of every prompt. are_messages: whether they are conversations.
        """
        with located("contrast"):
            encoded = self.prompts(*((None, contrast) if are_messages else (contrast,)))
        if len(encoded) not in (1, count):
            raise ValueError(
                f"contrast has {len(encoded)} prompts for {count} prompts; give one for all or one "
                "per prompt."
            )
        return encoded if len(encoded) == count else encoded * count

    def _check_ids(self, name: str, ids: Sequence[int]) -> None:
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise ValueError(
                f"{name} has token ids from {min(ids)} to {max(ids)}; the vocabulary has "
                f"{self.vocab_size}."
            )

    def _texts(self, prompts: Any) -> list[list[int]]:
        if isinstance(prompts, str):
            prompts = [prompts]
        prompts = as_list(prompts, "prompts", "text, token ids or a list of these")
        if len(prompts) > 0 and is_id(prompts[0]):
            prompts = [prompts]
        encoded = []
        for i, prompt in enumerate(prompts):
            with located(f"prompts[{i}]"):
                encoded.append(encode_prompt(prompt, self.tokenizer))
        return encoded

    def _conversations(self, messages: Any) -> list[list[int]]:
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            raise ValueError("the engine has no chat template for messages; give prompts.")
        encoded = []
        conversations = [messages] if is_chat(messages) else as_list(messages, "messages")
        for i, conversation in enumerate(conversations):
            if not is_chat(conversation):
                raise ValueError(
                    f"messages[{i}] must be a list of {{'role': ..., 'content': ...}}."
                )
            check_messages(conversation, f"messages[{i}]")
            with located(f"messages[{i}]"):
                encoded.append(encode_chat(conversation, self.tokenizer))
        return encoded

    def sequences(
        self,
        prompts: list[list[int]],
        sampling: SamplingParams,
        *,
        is_streamed: bool,
        contrast: list[list[int]] | None = None,
    ) -> list[sequence.Sequence]:
        """The sequences to decode: num_return_sequences per prompt, side by side."""
        limits = [self._max_new_tokens(i, ids, sampling) for i, ids in enumerate(prompts)]
        for i, ids in enumerate(contrast or ()):
            self.check_room(f"contrast[{i}]", len(ids), limits[i])
        seeds = sampling.seeds(len(prompts))
        self.check_top_logprobs(sampling.top_logprobs)
        for name, ids in sampling.named_ids():
            if ids:
                self._check_ids(name, ids)
        eos_token_ids = self._eos_token_ids(sampling.eos_token_id)
        stop_strings = self._stop_strings(sampling.stop_strings, len(prompts))
        special = {stops: special_in(stops, self.tokenizer) for stops in set(stop_strings)}
        searches_for_stops = any(stop_strings) and sampling.num_beams == 1
        copies = sampling.num_return_sequences
        return [
            sequence.Sequence(
                index=i * copies + copy,
                prompt_ids=prompts[i],
                max_new_tokens=limits[i],
                contrast_ids=None if contrast is None else contrast[i],
                seed=seeds[i] + copy,
                eos_token_ids=eos_token_ids,
                detokenizer=Detokenizer(self._decode, stop_strings[i], special[stop_strings[i]]),
                is_text_incremental=is_streamed or searches_for_stops,
            )
            for i in range(len(prompts))
            for copy in range(copies)
        ]

    def check_top_logprobs(self, value: int) -> None:
        if count("top_logprobs", value) > self.vocab_size:
            raise ValueError(
                f"top_logprobs must be at most the vocabulary's {self.vocab_size}; got {value}."
            )

    def _max_new_tokens(self, i: int, prompt_ids: list[int], sampling: SamplingParams) -> int:
        limit = sampling.limit(len(prompt_ids))
        if limit < 1 and sampling.max_new_tokens is None:
            raise ValueError(
                f"prompts[{i}] has {len(prompt_ids)} tokens; max_length = {sampling.max_length} "
                "leaves no room for new ones."
            )
        if sampling.min_new_tokens > limit:
            raise ValueError(
                f"min_new_tokens = {sampling.min_new_tokens} must be at most the new tokens that "
                f"prompts[{i}] may get, {limit}; raise max_new_tokens."
            )
        self.check_room(f"prompts[{i}]", len(prompt_ids), limit)
        return limit

    def check_room(self, name: str, length: int, new: int = 0, completion: int = 0) -> None:
        """Raise ValueError unless a prompt and what follows it fit the model's context.

        new: tokens to be generated; completion: tokens that are given.
        """
        models = {id(x): x for x in (self.model, self.base) if x is not None}.values()
        configs = [model.config.get_text_config() for model in models]
        contexts = [getattr(config, "max_position_embeddings", None) for config in configs]
        context = min((x for x in contexts if x is not None), default=None)
        total = self.virtual_tokens + length + completion + new
        if context is not None and total > context:
            parts = [f"{length + completion} tokens"]
            parts += [f"{self.virtual_tokens} virtual tokens"] if self.virtual_tokens else []
            parts += [f"max_new_tokens = {new}"] if new else []
            raise ValueError(
                f"{name} does not fit: {' and '.join(parts)} make {total}; the model's context is "
                f"{context}. Shorten the prompt{' or lower max_new_tokens' if new else ''}."
            )
        for virtual in {self.virtual_tokens, 0}:  # the base's rows have none
            start = virtual + length
            for model in models:
                longrope.check_constant(name, model.config, start, start + completion + new)

    def has_room(self, length: int, new: int) -> bool:
        """Whether a prompt and this many new tokens fit the model's context."""
        try:
            self.check_room("", length, new)
        except ValueError:
            return False
        return True

    def check_passages(self, passages: Sequence[Passage], names: Sequence[str]) -> None:
        """Raise ValueError for a passage without tokens, or with one too many for the model."""
        for name, (prompt, completion) in zip(names, passages, strict=True):
            if not prompt:
                raise ValueError(f"the prompt of {name} has no tokens of its own.")
            if not completion:
                raise ValueError(f"{name} has no tokens.")
            self._check_ids(f"the prompt of {name}", prompt)
            self._check_ids(name, completion)
            self.check_room(name, len(prompt), completion=len(completion))

    def _eos_token_ids(self, eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
        """The ids that end a sequence; by default the model's own."""
        if eos_token_id is None:
            generation = getattr(self.model, "generation_config", None)
            eos_token_id = getattr(generation, "eos_token_id", None)
        if eos_token_id is None and self.tokenizer is not None:
            eos_token_id = self.tokenizer.eos_token_id
        if eos_token_id is None:
            return frozenset()
        ids: Any = [eos_token_id] if is_id(eos_token_id) else eos_token_id
        with located("eos_token_id"):
            return frozenset(token_ids(ids))

    def _stop_strings(self, stop_strings: Any, prompts: int) -> list[tuple[str, ...]]:
        """Stop strings per prompt, from one, a list for all prompts, or a list of lists."""
        if isinstance(stop_strings, str):
            stop_strings = [stop_strings]
        stop_strings = as_list(stop_strings, "stop_strings", "text or a list of texts")
        if all(isinstance(stop, str) for stop in stop_strings):
            each = [tuple(stop_strings)] * prompts
        else:
            each = [
                (s,) if isinstance(s, str) else tuple(as_list(s or (), "each of stop_strings"))
                for s in stop_strings
            ]
        if len(each) != prompts:
            raise ValueError(
                f"stop_strings has {len(each)} lists for {prompts} prompts; give one list for all "
                "or one per prompt."
            )
        for stop in (stop for stops in each for stop in stops):
            if not isinstance(stop, str) or not stop:
                raise ValueError(f"stop_strings must be texts that are not empty; got {stop!r}.")
            if self.tokenizer is None:
                raise ValueError("stop_strings need a tokenizer; pass one to the engine.")
        return each

    def _decode(self, token_ids: list[int]) -> str:
        """Text without special tokens; empty without a tokenizer."""
        if self.tokenizer is None:
            return ""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))


def is_id(value: Any) -> bool:
    """Whether the value is one token id."""
    return isinstance(value, Integral) or getattr(value, "ndim", None) == 0
