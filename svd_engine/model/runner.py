"""One tree of modules and its KV cache: prompts go in, then tokens; hidden states come out."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from svd_engine.kernels.reference import softcapped
from svd_engine.model.kv_cache import KVCache
from svd_engine.model.layers.attention import causal


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """int64 `[rows, longest]`, zeros on the right."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens


@dataclass
class ModelRunner:
    """One tree of modules, its KV cache, and where the next token of each row goes.

    Virtual tokens come before the text of every row or, if `paired`, of the second half of the
    rows. Slot j of a row holds its position j.
    """

    model: PreTrainedModel
    paired: bool = False
    virtual: int = 0  # P, how many virtual tokens
    embeddings: Tensor | None = None  # theirs, [P, H]
    prefix: list[tuple[Tensor, Tensor]] | None = None  # or their keys and values, see `pairing`
    cache: KVCache = field(default_factory=KVCache)
    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # [rows]
    _places: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], extra: int = 0, room: int = 0) -> Tensor:
        """Hidden states `[rows, H]` at each prompt's last token.

        Leaves room for `extra` more tokens a row and, by `reorder`, for `room` rows.
        """
        tokens = padded(prompts).to(self.model.device)
        (rows, n), room = tokens.shape, max(room, len(prompts))
        first = rows // 2 if self.paired else 0  # the first row with virtual tokens
        self.cache.reserve(room, self.virtual + n + extra)
        before = torch.zeros(rows, dtype=torch.int64)
        before[first:] = self.virtual
        last = before + torch.tensor([len(prompt) for prompt in prompts]) - 1
        self._set_positions(last + 1, room)
        inputs = self.model.get_input_embeddings()(tokens)
        if self.embeddings is not None:
            text, inputs = inputs, inputs.new_zeros(rows, self.virtual + n, inputs.shape[2])
            inputs[:first, :n] = text[:first]
            inputs[first:, : self.virtual] = self.embeddings
            inputs[first:, self.virtual :] = text[first:]
            before.zero_()
        for index, pair in enumerate(self.prefix or ()):
            keys, values = (x.to(inputs.dtype) for x in pair)
            self.cache.fill(keys, values, index, first, self.virtual)
        columns = torch.arange(inputs.shape[1])
        positions = (before[:, None] + columns).to(tokens.device)
        start = int(before[0])
        live = int(before[-1]) + len(columns)
        uniform = start == int(before[-1])
        hidden = self._forward(positions, live, start if uniform else None, inputs_embeds=inputs)
        return hidden[torch.arange(rows), last - before]

    @torch.inference_mode()
    def extend(self, tokens: Tensor, live: int | None = None) -> Tensor:
        """Hidden states `[rows, q, H]` after q more tokens `[rows, q]` a row.

        live: what every position of the text stays below. With it shapes are static and no tensor
        is read on the host, so that a CUDA graph can hold the pass.
        """
        length, start = tokens.shape[1], None
        if live is not None:
            live += self.virtual
        else:
            next_slots = self.positions.tolist()
            live = max(next_slots) + length
            start = min(next_slots) if min(next_slots) == max(next_slots) else None
        positions = self.positions[:, None] + torch.arange(length, device=tokens.device)
        hidden = self._forward(positions, live, start, input_ids=tokens)
        self.positions += length
        return hidden

    @torch.inference_mode()
    def reorder(self, index: Tensor) -> None:
        """Row i continues from what row index[i] was; int64 `[rows]`, as many as there is room."""
        self.cache.reorder(index, int(self.positions.max()))
        self._set_positions(self.positions[index], len(index))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own head, with its softcap and scale: `[rows, H]` -> `[rows, V]`."""
        x = self.model.get_output_embeddings()(hidden)
        config = self.model.config
        scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        x = x if scale == 1 else x * scale
        return softcapped(x, softcap)

    @property
    def memory(self) -> tuple[int, int]:
        """Differs once tensors that outlive a request have moved."""
        return self.cache.allocations, self._places.data_ptr()

    def _set_positions(self, positions: Tensor, room: int) -> None:
        """Into memory that stays, because a captured step advances it in place."""
        if len(self._places) < room:
            self._places = torch.empty(room, dtype=torch.int64, device=self.model.device)
        self.positions = self._places[: len(positions)].copy_(positions)

    def _forward(self, positions: Tensor, live: int, start: int | None, **inputs: Tensor) -> Tensor:
        self.cache.place(positions, live, start)
        mask = None  # rows alike and a single token, which sees all there is
        if start is None or positions.shape[1] > 1:
            alike = positions if start is None else positions[:1]
            mask = causal(alike, live, self.model.dtype)
        return self.model.get_decoder()(
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **inputs,
        ).last_hidden_state
