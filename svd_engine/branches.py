"""The two models side by side: what a decoding loop and a scorer need of them, and no more."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from svd_engine import pairing
from svd_engine.attention import visible
from svd_engine.cache import KVCache
from svd_engine.kernels.reference import softcapped

logger = logging.getLogger(__name__)


@dataclass
class Stream:
    """One tree of modules, its KV cache, and the next position of each row."""

    model: PreTrainedModel
    embeddings: Tensor | None = None  # [P, H], put before the text
    prefix: list[tuple[Tensor, Tensor]] | None = None  # keys and values [kv_heads, P, head_dim]
    cache: KVCache = field(default_factory=KVCache)
    lengths: list[int] = field(default_factory=list)

    @property
    def virtual(self) -> int:
        if self.embeddings is not None:
            return len(self.embeddings)
        return self.prefix[0][0].shape[1] if self.prefix else 0

    def prefill(self, tokens: Tensor, lengths: Sequence[int], extra: int = 0) -> Tensor:
        """Hidden states `[rows, n, H]` of prompts padded on the right; leaves room for `extra`."""
        rows, n = tokens.shape
        self.cache.reserve(rows, self.virtual + n + extra)
        embeds, start = self.model.get_input_embeddings()(tokens), 0
        if self.embeddings is not None:
            embeds = torch.cat([self.embeddings.to(embeds.dtype).expand(rows, -1, -1), embeds], 1)
        if self.prefix is not None:
            start = self.virtual
            positions = torch.arange(start, device=tokens.device).expand(rows, -1)
            self.cache.place(positions, start, 0)
            for index, pair in enumerate(self.prefix):
                keys, values = (x.to(embeds.dtype).expand(rows, -1, -1, -1) for x in pair)
                self.cache.update(keys, values, index)
        end = start + embeds.shape[1]
        positions = torch.arange(start, end, device=tokens.device).expand(rows, -1)
        self.cache.place(positions, end, start)
        self.lengths = [self.virtual + length for length in lengths]
        hidden = self._forward(positions, visible(positions, end), inputs_embeds=embeds)
        return hidden[:, -n:]

    def step(self, tokens: Tensor) -> Tensor:
        """Hidden states `[rows, H]` after one more token `[rows]` a row."""
        live = max(self.lengths) + 1
        uniform = min(self.lengths) + 1 == live
        positions = torch.tensor(self.lengths, device=tokens.device)[:, None]
        self.cache.place(positions, live, live - 1 if uniform else None)
        self.lengths = [length + 1 for length in self.lengths]
        mask = None if uniform else visible(positions, live)
        return self._forward(positions, mask, input_ids=tokens[:, None])[:, 0]

    def _forward(self, positions: Tensor, mask: Tensor | None, **inputs: Tensor) -> Tensor:
        return self.model.get_decoder()(
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **inputs,
        ).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own head, with its softcap and scale: `[rows, H]` -> `[rows, V]`."""
        x = self.model.get_output_embeddings()(hidden)
        config = self.model.config
        scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        x = x if scale == 1 else x * scale
        return softcapped(x, softcap)


class Paired:
    """One batch [base rows, adapted rows] through the same weights: each is read once a step."""

    def __init__(self, model: PeftModel) -> None:
        self.stream = Stream(pairing.paired(model))

    @property
    def device(self) -> torch.device:
        return self.stream.model.device

    def prefill(self, tokens: Tensor, lengths: Sequence[int], extra: int = 0) -> tuple[Tensor, ...]:
        """Hidden states of (adapted, base), `[B, n, H]` each."""
        hidden = self.stream.prefill(tokens.repeat(2, 1), [*lengths, *lengths], extra)
        return tuple(hidden.chunk(2)[::-1])

    def step(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Hidden states of (adapted, base) after one more token, `[B, H]` each."""
        return tuple(self.stream.step(tokens.repeat(2)).chunk(2)[::-1])

    def logits(self, hidden: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Logits of (adapted, base) from `[N, H]` hidden states of the same."""
        return tuple(self.stream.logits(torch.cat(tuple(hidden)[::-1])).chunk(2)[::-1])


class Sequential:
    """One pass a model, each with its own cache: right for every method, and the way to run one
    model alone."""

    def __init__(self, *streams: Stream) -> None:
        self.streams = streams

    @property
    def device(self) -> torch.device:
        return self.streams[0].model.device

    def prefill(self, tokens: Tensor, lengths: Sequence[int], extra: int = 0) -> tuple[Tensor, ...]:
        return tuple(s.prefill(tokens, lengths, extra) for s in self.streams)

    def step(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return tuple(s.step(tokens) for s in self.streams)

    def logits(self, hidden: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(s.logits(h) for s, h in zip(self.streams, hidden, strict=True))


Branches = Paired | Sequential


def adapted_stream(model: PeftModel) -> Stream:
    return Stream(pairing.adapted(model), pairing.prompt_embeddings(model), pairing.prefix(model))


def base_stream(model: PeftModel) -> Stream:
    return Stream(pairing.base(model))


def pair(model: PeftModel, form: str = "auto") -> Branches:
    """The pair of models in the form asked for: "auto", "paired" or "sequential"."""
    if form not in ("auto", "paired", "sequential"):
        raise ValueError(f"pairing must be 'auto', 'paired' or 'sequential'; got {form!r}.")
    reason = pairing.why_not_paired(model)
    if reason is None and form != "sequential":
        return Paired(model)
    if form == "paired":
        raise ValueError(f"pairing='paired' is not possible: {reason}. pairing='auto' decodes it.")
    if form == "auto":
        logger.warning("Two forward passes a token, because %s.", reason)
    return Sequential(adapted_stream(model), base_stream(model))
