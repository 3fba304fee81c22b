"""The constraints of a request as processors of transformers, in its order."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from svd_engine.generation.arguments import ids
from svd_engine.generation.grammar import Grammar, GrammarProcessor
from svd_engine.generation.sampling_params import SamplingParams
from svd_engine.generation.sequence import Sequence


def processors(
    sampling: SamplingParams, sequence: Sequence, like: Tensor, grammar: Grammar | None
) -> LogitsProcessorList:
    """The constraints as processors, in transformers' order, for logits such as `like` `[R, V]`."""
    chain, eos, prompt = LogitsProcessorList(), sorted(sequence.eos_token_ids), sequence.prompt_ids
    device: Any = like.device
    if sampling.biases:
        chain.append(SequenceBiasLogitsProcessor(sampling.biases))  # type: ignore[arg-type]
    if sampling.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.presence_penalty or sampling.frequency_penalty:
        penalties = sampling.presence_penalty, sampling.frequency_penalty
        chain.append(CountPenalty(len(prompt), *penalties))
    if sampling.no_repeat_ngram_size:
        chain.append(NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size))
    if words := [word for word in sampling.bad_words if word not in [[one] for one in eos]]:
        chain.append(NoBadWordsLogitsProcessor(words))
    if sampling.min_length and eos:
        chain.append(MinLengthLogitsProcessor(sampling.min_length, eos, device))
    if sampling.min_new_tokens and eos:
        least = sampling.min_new_tokens
        chain.append(MinNewTokensLengthLogitsProcessor(len(prompt), least, eos, device))
    if sampling.prefix_allowed_tokens_fn is not None:
        allowed = _Allowed(sampling, sequence, like.shape[1])
        chain.append(PrefixConstrainedLogitsProcessor(allowed, 1))
    if grammar is not None:
        chain.append(GrammarProcessor(grammar, sequence))
    if sampling.forced_bos_token_id is not None:
        chain.append(ForcedBOSTokenLogitsProcessor(sampling.forced_bos_token_id))
    if sampling.forced_eos_token_id is not None:
        forced, longest = sampling.forced_eos_token_id, len(prompt) + sequence.max_new_tokens
        chain.append(
            ForcedEOSTokenLogitsProcessor(longest, ids("forced_eos_token_id", forced), device)
        )
    if sampling.suppress_tokens is not None:
        gone = ids("suppress_tokens", sampling.suppress_tokens)
        chain.append(SuppressTokensLogitsProcessor(gone, device))
    if sampling.begin_suppress_tokens is not None:
        gone = ids("begin_suppress_tokens", sampling.begin_suppress_tokens)
        is_forced = len(prompt) == 1 and sampling.forced_bos_token_id is not None
        begin = len(prompt) + is_forced
        chain.append(SuppressTokensAtBeginLogitsProcessor(gone, begin, device))
    return chain


class _Allowed:
    """`prefix_allowed_tokens_fn` for the rows of one sequence."""

    def __init__(self, sampling: SamplingParams, sequence: Sequence, vocab_size: int) -> None:
        assert sampling.prefix_allowed_tokens_fn is not None
        self._function, self._vocab_size = sampling.prefix_allowed_tokens_fn, vocab_size
        copies = sampling.num_return_sequences if sampling.num_beams > 1 else 1
        self._index = sequence.index // copies

    def __call__(self, _: int, token_ids: Tensor) -> list[int]:
        allowed = ids("prefix_allowed_tokens_fn", self._function(self._index, token_ids))
        if max(allowed, default=0) >= self._vocab_size:
            raise ValueError(
                f"prefix_allowed_tokens_fn allowed the token {max(allowed)}; the vocabulary has "
                f"{self._vocab_size}."
            )
        return allowed


class CountPenalty(LogitsProcessor):
    """OpenAI's penalties of a token that came after the prompt: once, and each time it came."""

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        self.prompt, self.presence, self.frequency = prompt, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        new = input_ids[:, self.prompt :]
        counts = torch.zeros_like(scores).scatter_add_(1, new, scores.new_ones(new.shape))
        return scores - self.frequency * counts - self.presence * (counts > 0)
