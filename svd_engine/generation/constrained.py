"""Logits under the constraints of a request, which always leave a token."""

from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from svd_engine.generation.constraint_chain import processors
from svd_engine.generation.grammar import Grammar
from svd_engine.generation.sampling_params import SamplingParams
from svd_engine.generation.sequence import Sequence


class Row(NamedTuple):
    """A batch row: its sequence, and the tokens after the prompt, which differ between beams."""

    sequence: Sequence
    token_ids: list[int]

    @property
    def all_ids(self) -> list[int]:
        return self.sequence.prompt_ids + self.token_ids


@dataclass
class Constrain:
    """Applies the constraints of a request to the logits of its rows.

    Where they leave nothing of what steering left to a row, they take the adapted model's logits.
    """

    sampling: SamplingParams
    grammar: Grammar | None = None
    _chains: dict[tuple[int, ...], LogitsProcessorList] = field(default_factory=dict)

    def __call__(self, rows: ListOf[Row], steered: Tensor, adapted: Tensor) -> Tensor:
        """Return constrained logits `[R, V]`; those of `steered` that are -inf are off the support.

        Raise ValueError if the constraints remove every token.
        """
        on_support = ~steered.isneginf()
        whole = torch.where(on_support, steered, adapted)
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, row in enumerate(rows):
            alike.setdefault((*self._key(row.sequence), len(row.token_ids)), []).append(i)
        constrained = torch.empty_like(whole)
        for key, index in alike.items():
            token_ids: Any = torch.tensor([rows[i].all_ids for i in index], device=whole.device)
            chain = self._chain(key[:-1], rows[index[0]].sequence, whole)
            constrained[index] = chain(token_ids, whole[index])
        left = ~constrained.isneginf()
        if not left.any(1).all():
            raise ValueError(
                "the constraints remove every token after the tokens ... "
                f"{rows[int(left.any(1).int().argmin())].all_ids[-8:]}; leave some of them out."
            )
        reached = (left & on_support).any(1, keepdim=True)
        return constrained.masked_fill_(reached & ~on_support, -torch.inf)

    def _key(self, sequence: Sequence) -> tuple[int, ...]:
        """What a chain depends on."""
        is_own = self.sampling.prefix_allowed_tokens_fn is not None or self.grammar is not None
        own = (sequence.index,) if is_own else ()
        return (len(sequence.prompt_ids), sequence.max_new_tokens, *own)

    def _chain(self, key: tuple[int, ...], sequence: Sequence, like: Tensor) -> LogitsProcessorList:
        if key not in self._chains:
            self._chains[key] = processors(self.sampling, sequence, like, self.grammar)
        return self._chains[key]


def build(
    sampling: SamplingParams, sequences: ListOf[Sequence], grammar: Grammar | None
) -> Constrain | None:
    """The constraints of a request; None if there are none."""
    like = torch.empty(1, 1)
    chains = (processors(sampling, sequence, like, grammar) for sequence in sequences)
    return Constrain(sampling, grammar) if any(chains) else None
