"""Steered generation: a KV-cache loop around the two models and one operator call a token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from svd_engine import branches, checks, models, ops, teacher
from svd_engine import pairing as forms
from svd_engine.steering import SteeringConfig

Prompt = str | Sequence[int]


@dataclass
class Completion:
    """What one prompt became."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # under the steered distribution
    finish_reason: str = "length"  # or "stop": an end-of-sequence token, kept in token_ids
    text: str = ""  # without special tokens; empty if the engine has no tokenizer


class SteeredEngine:
    """Decodes a PEFT model against its own base, steered; `steering=None` decodes it alone.

    model: a PEFT causal language model with one active adapter; it is left as it was found.
    pairing: "paired" runs both models as one batch through shared weights, "sequential" one after
    the other, "auto" pairs where the method allows it.
    `steering` may be set anew between calls.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        steering: SteeringConfig | None = None,
        pairing: str = "auto",
    ) -> None:
        if not isinstance(model, PeftModel):
            raise ValueError(f"model must be a PeftModel; got {type(model).__name__}.")
        forms.check_recoverable(model)
        self.model, self.tokenizer = model, tokenizer
        self.vocab_size = model.get_base_model().config.get_text_config().vocab_size
        self.context = getattr(
            model.get_base_model().config.get_text_config(), "max_position_embeddings", None
        )
        self.virtual_tokens = forms.virtual_tokens(model)
        self._pairing = pairing
        self._both = branches.both(model, pairing)
        self._alone: branches.Branches | None = None
        self._steering: SteeringConfig | None = None
        self.steering = steering

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        adapter: str | Path,
        *,
        steering: SteeringConfig | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        pairing: str = "auto",
    ) -> "SteeredEngine":
        """Load a base model, a PEFT adapter and, unless given, the steering beside the adapter.

        base: a folder, a Hub name or "smollm2". A folder without steering decodes the adapted
        model alone until `steering` is set.
        """
        model, tokenizer = models.load_base(base, dtype=dtype, device=device)
        peft_model = models.load_adapter(model, adapter)
        if steering is None and models.has_steering(adapter):
            steering = SteeringConfig.from_pretrained(adapter)
        return cls(peft_model, tokenizer, steering, pairing)

    @property
    def steering(self) -> SteeringConfig | None:
        return self._steering

    @steering.setter
    def steering(self, value: SteeringConfig | None) -> None:
        if value is not None:
            value.check_vocabulary(self.vocab_size)
        self._steering = value

    @property
    def both(self) -> branches.Branches:
        """The adapted and the base model, in the form that decodes them."""
        return self._both

    def branches(self) -> branches.Branches:
        """What the current steering decodes: both models, or the adapted one alone."""
        if self.steering is not None:
            return self._both
        if self._alone is None:
            self._alone = branches.Sequential(branches.adapted_stream(self.model))
        return self._alone

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Complete one prompt or a ragged batch; one `Completion` a prompt, in order.

        A prompt is text or token ids. temperature 0 is greedy. Row i draws its noise from seed + i
        and its own positions, so a request gives the same tokens alone or in a batch.
        eos_token_id: ids that end a row; by default the model's own.
        """
        rows = self._encode(prompts, max_new_tokens)
        completions = [Completion() for _ in rows]
        ends = self._ends(eos_token_id)
        steps = self._decode(rows, max_new_tokens, temperature, top_k, top_p, min_p, seed, ends)
        for step in tqdm(steps, total=max_new_tokens, disable=not progress, unit="token"):
            for completion, drawn in zip(completions, step, strict=True):
                if drawn is not None:
                    completion.token_ids.append(drawn[0])
                    completion.logprobs.append(drawn[1])
        for completion in completions:
            if completion.token_ids and completion.token_ids[-1] in ends:
                completion.finish_reason = "stop"
            completion.text = self._text(completion.token_ids)
        return completions

    def stream(
        self, prompt: Prompt, *, max_new_tokens: int = 128, temperature: float = 0.0,
        top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> Iterator[str]:  # fmt: skip
        """The text of `generate(prompt, ...)` in pieces, as tokens come."""
        if self.tokenizer is None:
            raise ValueError("stream yields text and needs a tokenizer; pass one to the engine.")
        rows = self._encode([prompt], max_new_tokens)
        ends = self._ends(eos_token_id)
        token_ids: list[int] = []
        shown = ""
        steps = self._decode(rows, max_new_tokens, temperature, top_k, top_p, min_p, seed, ends)
        for ((token, _),) in steps:  # type: ignore[misc]
            token_ids.append(token)
            text = self._text(token_ids)
            # A character may span tokens; until it is whole it decodes to the replacement mark.
            if not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
        yield self._text(token_ids)[len(shown) :]

    def score(
        self, prompt: Prompt, continuations: Sequence[Prompt], *, penalty: float = 0.0
    ) -> list[float]:
        """log P of each continuation of the prompt, in nats, under the steered distribution.

        penalty 0 leaves tokens off the support as they are, so that an answer is not ranked by how
        many of its tokens fall outside.
        """
        start = self._encode([prompt], 0)[0]
        passages = [teacher.Passage(start, self.ids(c, special=False)) for c in continuations]
        self.check_passages(passages)
        strength, alpha = 0.0, 0.0
        if self.steering is not None:
            strength, alpha = self.steering.strength, self.steering.alpha
        return teacher.score(self.branches(), passages, strength, alpha, penalty)

    def ids(self, prompt: Prompt, special: bool = True) -> list[int]:
        """Token ids of text or ids; `special` adds what the tokenizer puts before a text."""
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self.tokenizer is None:
            raise ValueError("prompts are text and need a tokenizer; pass one or give token ids.")
        return self.tokenizer(prompt, add_special_tokens=special)["input_ids"]

    def check_passages(self, passages: Sequence[teacher.Passage]) -> None:
        for i, (prompt, completion) in enumerate(passages):
            if not prompt or not completion:
                raise ValueError(f"passage {i} has an empty prompt or completion.")
            self._check_length(f"passage {i}", len(prompt) + len(completion), 0)

    def _encode(self, prompts: Any, max_new_tokens: int) -> list[list[int]]:
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be >= 0; got {max_new_tokens}.")
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        rows = [self.ids(prompt) for prompt in ([prompts] if single else prompts)]
        for i, row in enumerate(rows):
            if not row:
                raise ValueError(f"prompts[{i}] is empty; give at least one token.")
            if min(row) < 0 or max(row) >= self.vocab_size:
                raise ValueError(
                    f"prompts[{i}] has token ids from {min(row)} to {max(row)}; the vocabulary has "
                    f"{self.vocab_size}."
                )
            self._check_length(f"prompts[{i}]", len(row), max_new_tokens)
        return rows

    def _check_length(self, name: str, length: int, new: int) -> None:
        total = self.virtual_tokens + length + new
        if self.context is not None and total > self.context:
            parts = [f"{length} tokens"]
            parts += [f"{self.virtual_tokens} virtual tokens"] if self.virtual_tokens else []
            parts += [f"max_new_tokens = {new}"] if new else []
            raise ValueError(
                f"{name} does not fit: {' and '.join(parts)} make {total}; the model's context is "
                f"{self.context}. Shorten the prompt{' or lower max_new_tokens' if new else ''}."
            )

    def _ends(self, eos_token_id: int | Sequence[int] | None) -> set[int]:
        if eos_token_id is None:
            generation = getattr(self.model.get_base_model(), "generation_config", None)
            eos_token_id = getattr(generation, "eos_token_id", None)
        if eos_token_id is None and self.tokenizer is not None:
            eos_token_id = self.tokenizer.eos_token_id
        if eos_token_id is None:
            return set()
        return {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)

    def _text(self, token_ids: list[int]) -> str:
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    @torch.inference_mode()
    def _decode(
        self, rows: list[list[int]], max_new_tokens: int, temperature: float, top_k: int,
        top_p: float, min_p: float, seed: int, ends: set[int],
    ) -> Iterator[list[tuple[int, float] | None]]:  # fmt: skip
        """The loop: per step one (token, logprob) a row, None for a row that has ended."""
        checks.sampling(temperature, top_k, top_p, min_p)
        if not rows or max_new_tokens == 0:
            return
        pair, steering = self.branches(), self.steering or SteeringConfig(0.0, alpha=0.0)
        device = self.model.device
        lengths = torch.tensor([len(row) for row in rows], device=device)
        tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
        hidden = pair.prefill(tokens.to(device), lengths.tolist(), max_new_tokens)
        last = torch.arange(len(rows), device=device), lengths - 1
        hidden = tuple(h[last] for h in hidden)
        seeds = torch.arange(seed, seed + len(rows), device=device)
        running = [True] * len(rows)
        for count in range(max_new_tokens):
            logits = pair.logits(hidden)
            token, logprob = ops.sample(
                logits[0], logits[-1], steering.strength, alpha=steering.alpha,
                penalty=steering.penalty, temperature=temperature, top_k=top_k, top_p=top_p,
                min_p=min_p, seed=seeds, position=lengths + count,
            )  # fmt: skip
            drawn = list(zip(token.tolist(), logprob.tolist(), strict=True))
            for i, (chosen, _) in enumerate(drawn):
                if running[i] and chosen < 0:
                    raise ValueError(f"prompts[{i}]: the model's logits are not finite.")
            yield [one if alive else None for one, alive in zip(drawn, running, strict=True)]
            running = [
                alive and chosen not in ends
                for (chosen, _), alive in zip(drawn, running, strict=True)
            ]
            if not any(running) or count + 1 == max_new_tokens:
                return
            hidden = pair.step(token.clamp(min=0))
