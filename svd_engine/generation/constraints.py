"""Constraints of generation, with the names of `transformers.GenerationConfig` and OpenAI's API."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from svd_engine.generation import text_form
from svd_engine.generation.arguments import ids
from svd_engine.utils.arguments import count, number

# (index of the completion, or of the prompt with beams; its ids so far) -> the ids allowed next
AllowedTokens = Callable[[int, Tensor], Sequence[int]]


@dataclass(frozen=True)
class Constraints:
    """What changes or removes logits, given the tokens so far; docs/engine.md describes each field.

    Raises ValueError for a value of another kind or out of range.
    """

    min_new_tokens: int = 0
    min_length: int = 0  # of prompt and completion
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    sequence_bias: Mapping[tuple[int, ...], float] | Sequence[Any] | None = None
    logit_bias: Mapping[int, float] | None = None
    prefix_allowed_tokens_fn: AllowedTokens | None = None
    regex: str | None = None  # which texts there are
    json_schema: Mapping[str, Any] | str | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0

    def __post_init__(self) -> None:
        for name in ("min_new_tokens", "min_length", "no_repeat_ngram_size"):
            object.__setattr__(self, name, count(name, getattr(self, name)))
        for name in ("presence_penalty", "frequency_penalty"):
            number(name, getattr(self, name))
        if not 0 < number("repetition_penalty", self.repetition_penalty):
            raise ValueError(f"repetition_penalty must be > 0; got {self.repetition_penalty}.")
        if not 0 < number("typical_p", self.typical_p) <= 1:
            raise ValueError(f"typical_p must lie in (0, 1]; got {self.typical_p}.")
        for name in ("epsilon_cutoff", "eta_cutoff"):
            if not 0 <= number(name, getattr(self, name)) < 1:
                raise ValueError(f"{name} must lie in [0, 1); got {getattr(self, name)}.")
        if self.forced_bos_token_id is not None:
            count("forced_bos_token_id", self.forced_bos_token_id)
        if not (self.prefix_allowed_tokens_fn is None or callable(self.prefix_allowed_tokens_fn)):
            raise ValueError(
                "prefix_allowed_tokens_fn must be a function of an index and token ids; got "
                f"{self.prefix_allowed_tokens_fn!r}."
            )
        for _ in self.named_ids():
            pass
        if self.form is not None:
            for name in ("forced_bos_token_id", "forced_eos_token_id"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{self.form.name} says which tokens may come; leave out {name}."
                    )

    @property
    def form(self) -> text_form.TextForm | None:
        """What regex or json_schema ask of the text after the prompt."""
        return text_form.read(self.regex, self.json_schema)

    @property
    def bad_words(self) -> list[list[int]]:
        """bad_words_ids in its plain form."""
        return [
            _sequence("bad_words_ids", word) for word in _items("bad_words_ids", self.bad_words_ids)
        ]

    @property
    def biases(self) -> dict[tuple[int, ...], float]:
        """sequence_bias and logit_bias: sequence of tokens -> what its last one gains."""
        pairs = self.sequence_bias
        if not isinstance(pairs, Mapping):
            listed = _items("sequence_bias", pairs)
            if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in listed):
                raise ValueError(
                    "sequence_bias must map tuples of token ids to numbers, or list [ids, number]; "
                    f"got {pairs!r}."
                )
            pairs = [(_sequence("sequence_bias", tokens), bias) for tokens, bias in listed]
        else:
            pairs = [(_sequence("sequence_bias", tokens), bias) for tokens, bias in pairs.items()]
        found = {tuple(tokens): _bias("sequence_bias", bias) for tokens, bias in pairs}
        if not isinstance(self.logit_bias, Mapping | None):
            raise ValueError(f"logit_bias must map token ids to numbers; got {self.logit_bias!r}.")
        for token, bias in (self.logit_bias or {}).items():
            digits = isinstance(token, str) and token.isascii() and token.isdigit()  # from JSON
            (one,) = ids("logit_bias", [int(token) if digits else token])
            found[one,] = found.get((one,), 0.0) + _bias("logit_bias", bias)
        return found

    def named_ids(self) -> Iterator[tuple[str, list[int]]]:
        """All token ids in the fields, by the name of the field."""
        for name in ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id"):
            if getattr(self, name) is not None:
                yield name, ids(name, getattr(self, name))
        if self.forced_bos_token_id is not None:
            yield "forced_bos_token_id", [self.forced_bos_token_id]
        yield from (("bad_words_ids", word) for word in self.bad_words)
        yield from (("sequence_bias or logit_bias", [*tokens]) for tokens in self.biases)


def _items(name: str, value: Any) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise ValueError(f"{name} must be a list; got {value!r}.")
    return list(value)


def _sequence(name: str, value: Any) -> list[int]:
    """Token ids, at least one."""
    if isinstance(value, int) or not (found := ids(name, value)):
        raise ValueError(f"{name} must hold sequences of token ids, not empty; got {value!r}.")
    return found


def _bias(name: str, value: Any) -> float:
    """A number; -inf removes a token."""
    return -math.inf if value == -math.inf else number(name, value)
