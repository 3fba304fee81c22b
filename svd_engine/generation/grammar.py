"""Constrained texts: the tokens with which a text can still have its form."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from svd_engine.generation.prefix_cache import alike
from svd_engine.generation.sequence import Sequence
from svd_engine.generation.text_form import TextForm, reason

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


@dataclass(frozen=True)
class Grammar:
    """A form of texts over one vocabulary.

    name: of the option that gave it. start: a matcher that has read nothing.
    """

    name: str
    start: "LLMatcher"
    tokenizer: "LLTokenizer"


class Grammars:
    """Makes the grammars of an engine's calls. What it reads of the tokenizer outlives them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._read: LLTokenizer | None = None

    def build(self, form: TextForm | None, sequences: list[Sequence]) -> Grammar | None:
        """The grammar of sequences that must have a form. Raise ValueError if it cannot be."""
        if form is None:
            return None
        if not all(sequence.eos_token_ids for sequence in sequences):
            raise ValueError(
                f"{form.name} needs a token that ends the text, and there is none; give "
                "eos_token_id."
            )
        from llguidance import LLMatcher

        tokenizer = self._vocabulary(form.name)
        start = LLMatcher(tokenizer, form.grammar, log_level=0)
        if not any(start.compute_bitmask()) or start.is_error():
            raise ValueError(f"{form.name} has no text that the vocabulary can write; change it.")
        return Grammar(form.name, start, tokenizer)

    def _vocabulary(self, name: str) -> "LLTokenizer":
        """The tokens as llguidance takes them; reading them takes a second or so."""
        if self._read is None:
            from llguidance.hf import from_tokenizer

            if self._tokenizer is None:
                raise ValueError(f"{name} needs a tokenizer; pass one to the engine.")
            size = max(self._vocab_size, len(self._tokenizer))
            try:
                self._read = from_tokenizer(self._tokenizer, n_vocab=size)  # type: ignore[arg-type]
            except ValueError as error:
                kind = type(self._tokenizer).__name__
                raise ValueError(
                    f"{name} needs a tokenizer that llguidance can read, and this {kind} is none: "
                    f"{error}. Leave {name} out."
                ) from error
        return self._read


class GrammarProcessor(LogitsProcessor):
    """Removes the tokens with which the text after a sequence's prompt cannot have its form."""

    def __init__(self, grammar: Grammar, sequence: Sequence) -> None:
        self._grammar = grammar
        self._prompt, self._ends = len(sequence.prompt_ids), sequence.eos_token_ids
        self._matcher = grammar.start.deep_copy()
        self._read: list[int] = []  # by the matcher

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        texts = input_ids[:, self._prompt :].tolist()
        allowed = torch.stack([self._after(text, scores.shape[1]) for text in texts])
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)

    def _after(self, tokens: list[int], size: int) -> Tensor:
        """Which tokens may come after these, bool `[size]`. A text ends only where it is whole."""
        self._move(tokens)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[:size].astype(bool)
        if self._matcher.is_error():
            raise ValueError(
                f"{self._grammar.name} became too much work after the tokens ... {tokens[-8:]}: "
                f"{reason(self._matcher.get_error())}. Give a simpler one."
            )
        allowed[[token for token in self._grammar.tokenizer.eos_tokens if token < size]] = False
        allowed[[token for token in self._ends if token < size]] = self._matcher.is_accepting()
        return torch.from_numpy(allowed)

    def _move(self, tokens: list[int]) -> None:
        """Let the matcher stand after these tokens. Beams go back to where they part."""
        same = alike(self._read, tokens)
        if same < len(self._read):
            self._matcher.rollback(len(self._read) - same)
        if not self._matcher.consume_tokens(tokens[same:]):
            raise ValueError(
                f"{self._grammar.name} does not allow the tokens ... {tokens[-8:]}, which a logits "
                "processor chose; leave one of them out."
            )
        self._read = tokens
