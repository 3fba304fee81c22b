"""A tree of modules with its KV cache: prompts go in, then tokens; hidden states come out."""

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from svd_engine.model.freed_memory import keep_freed_memory
from svd_engine.model.kept_rows import Layers
from svd_engine.model.kv_cache import KVCache
from svd_engine.model.layers.attention import causal, causal_mask
from svd_engine.model.peft_adapter import Prefix
from svd_engine.model.step.cpu import CpuStep
from svd_engine.model.step.cuda import CudaStep
from svd_engine.ops.head import softcapped


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Return int64 `[rows, longest]`, padded with zeros on the right."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens


@dataclass
class ModelRunner:
    """A tree of modules, its KV cache, and the position of each row's next token.

    Virtual tokens precede the text of every row or, if `paired`, of the second half of the rows.
    Slot j of a row holds its position j.
    """

    model: PreTrainedModel
    paired: bool = False
    virtual_tokens: int = 0  # P
    prompt_embeddings: Tensor | None = None  # of the virtual tokens, [P, H]
    prefix: Prefix | None = None  # or their keys and values
    native: CpuStep | CudaStep | None = None  # runs a few new tokens in the place of the modules
    how: str = "module by module"  # how steps run
    cache: KVCache = field(default_factory=KVCache)
    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # [rows]
    _position_buffer: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        keep_freed_memory()

    def fork(self) -> "ModelRunner":
        """Return a runner of the same modules with a cache of its own."""
        native = None if self.native is None else type(self.native)(self.native.plan)
        empty = torch.empty(0, dtype=torch.int64, device=self.model.device)
        return replace(
            self, native=native, cache=KVCache(), positions=empty, _position_buffer=empty
        )

    @torch.inference_mode()
    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 0,
        max_rows: int = 0,
        chunk: int | None = None,
    ) -> Tensor:
        """Return hidden states `[rows, H]` at each prompt's last token.

        The KV cache gets slots for `max_new_tokens` more tokens per row and, for `reorder`, at
        least `max_rows` rows. chunk: the most tokens of a row to read at once, if there is a limit.
        """
        if chunk is not None and (longest := max(map(len, prompts))) > chunk:
            room = longest - chunk + max_new_tokens
            hidden = self.prefill([prompt[:chunk] for prompt in prompts], room, max_rows)
            return self.read_on([prompt[chunk:] for prompt in prompts], hidden, chunk)
        tokens = padded(prompts).to(self.model.device)
        (rows, n), max_rows = tokens.shape, max(max_rows, len(prompts))
        first_adapted_row = rows // 2 if self.paired else 0  # the first row with virtual tokens
        self.cache.reserve(max_rows, self.virtual_tokens + n + max_new_tokens)
        before = torch.zeros(rows, dtype=torch.int64)  # positions before each row's inputs
        before[first_adapted_row:] = self.virtual_tokens
        last = before + torch.tensor([len(prompt) for prompt in prompts]) - 1
        self._set_positions(last + 1, max_rows)
        inputs = self.model.get_input_embeddings()(tokens)
        if self.prompt_embeddings is not None:
            text = inputs
            inputs = inputs.new_zeros(rows, self.virtual_tokens + n, inputs.shape[2])
            inputs[:first_adapted_row, :n] = text[:first_adapted_row]
            inputs[first_adapted_row:, : self.virtual_tokens] = self.prompt_embeddings
            inputs[first_adapted_row:, self.virtual_tokens :] = text[first_adapted_row:]
            before.zero_()
        for index, layer in enumerate(self.prefix or ()):
            keys, values = (x.to(inputs.dtype) for x in layer)
            self.cache.fill(keys, values, index, first_adapted_row, self.virtual_tokens)
        if self.native is not None and inputs.shape[:2].numel() <= self.native.most_prompt_tokens:
            for index, part in enumerate(self.native.plan.layers):
                self.cache.make_layer(index, part.kv_heads, part.head_dim, self.native.dtype)
            hidden = self.native.run(inputs, before, self.cache, first_adapted_row, False)
            return hidden[torch.arange(rows), last - before]
        columns = torch.arange(inputs.shape[1])
        positions = (before[:, None] + columns).to(tokens.device)
        start = int(before[0])
        kv_length = int(before[-1]) + len(columns)
        common_start = start if start == int(before[-1]) else None
        own = torch.minimum(positions, last[:, None].to(tokens.device))  # padding adds no length
        hidden = self._forward(
            positions, kv_length, common_start, position_ids=own, inputs_embeds=inputs
        )
        if self.native is not None:
            self.native.prepare(self.cache)
        return hidden[torch.arange(rows), last - before]

    @torch.inference_mode()
    def take(self, row: int, tokens: int) -> Layers:
        """Copy keys and values of the first tokens of a row's text, virtual tokens included."""
        return self.cache.take(row, tokens + self._virtual(row, len(self.positions)))

    @torch.inference_mode()
    def put(
        self, beginnings: Sequence[tuple[Layers, int]], max_new_tokens: int, max_rows: int
    ) -> None:
        """Let each row go on from the first tokens of a text that was taken, so many of them.

        The KV cache gets slots for `max_new_tokens` more than the longest, and `max_rows` rows.
        """
        rows = len(beginnings)
        longest = max(tokens for _, tokens in beginnings)
        self.cache.reserve(max(max_rows, rows), self.virtual_tokens + longest + max_new_tokens)
        ends = [tokens + self._virtual(row, rows) for row, (_, tokens) in enumerate(beginnings)]
        for row, (layers, _) in enumerate(beginnings):
            self.cache.put(row, ends[row], layers)
        self._set_positions(torch.tensor(ends), max(max_rows, rows))
        if self.native is not None:
            self.native.prepare(self.cache)

    @torch.inference_mode()
    def read_on(
        self, rest: Sequence[Sequence[int]], hidden: Tensor, chunk: int | None = None
    ) -> Tensor:
        """Read more tokens of each row, at most `chunk` of a row at once.

        Return the hidden states after each row's last, and those given where a row has none.
        """
        longest = max(map(len, rest))
        hidden, size = hidden.clone(), chunk or max(longest, 1)
        for start in range(0, longest, size):
            pieces = [row[start : start + size] for row in rest]
            tokens = padded(pieces).to(hidden.device)
            lengths = torch.tensor([len(piece) for piece in pieces], device=hidden.device)
            read = self.extend(tokens)
            self.set_back(tokens.shape[1] - lengths)
            rows = lengths.nonzero()[:, 0]
            hidden[rows] = read[rows, lengths[rows] - 1]
        return hidden

    def _virtual(self, row: int, rows: int) -> int:
        """Return how many virtual tokens precede the text of a row."""
        return self.virtual_tokens if row >= (rows // 2 if self.paired else 0) else 0

    @torch.inference_mode()
    def extend(self, tokens: Tensor, kv_length: int | None = None) -> Tensor:
        """Return hidden states `[rows, q, H]` after q more tokens per row, `[rows, q]`.

        kv_length: upper bound on positions of the text. Passing it makes shapes static and avoids
        host reads, so that a CUDA graph can capture the pass.
        """
        if self._runs_natively(tokens):
            return self._native(tokens, with_logits=False)
        length, start = tokens.shape[1], None
        if kv_length is not None:
            kv_length += self.virtual_tokens
        else:
            next_slots = self.positions.tolist()
            kv_length = max(next_slots) + length
            start = min(next_slots) if min(next_slots) == max(next_slots) else None
        positions = self.positions[:, None] + torch.arange(length, device=tokens.device)
        hidden = self._forward(
            positions, kv_length, start, position_ids=positions, input_ids=tokens
        )
        self.positions += length
        return hidden

    @torch.inference_mode()
    def step(self, tokens: Tensor, kv_length: int | None = None) -> Tensor:
        """Return logits `[rows, V]` after one more token per row, `[rows]`.

        Of several, `[rows, q]`, return those after each: `[rows, q, V]`.
        """
        if tokens.ndim == 1:
            return self.step(tokens[:, None], kv_length)[:, 0]
        if self._runs_natively(tokens) and self.native.plan.head is not None:  # type: ignore
            return self._scaled(self._native(tokens, with_logits=True))
        hidden = self.extend(tokens, kv_length)  # the head rounds by the rows it gets
        return torch.stack([self.logits(h) for h in hidden.unbind(1)], 1)

    def most_new(self, rows: int) -> int:
        """Return of how many new tokens per row a step gives each the bits that it has alone."""
        step = self.native
        return 1 if step is None else min(step.most_new, step.most_tokens // rows)

    @torch.inference_mode()
    def set_back(self, tokens: Tensor) -> None:
        """Forget each row's latest tokens, `[rows]` of them: what comes next overwrites them."""
        self.positions -= tokens

    @property
    def longest(self) -> int:
        """The most tokens of text in a row."""
        return int(self.positions.max()) - self.virtual_tokens

    def _runs_natively(self, tokens: Tensor) -> bool:
        return self.native is not None and tokens.numel() <= self.native.most_tokens

    def _native(self, tokens: Tensor, with_logits: bool) -> Tensor:
        assert self.native is not None
        embedded = self.model.get_input_embeddings()(tokens)
        first_adapted_row = len(tokens) // 2 if self.paired else 0
        out = self.native.run(embedded, self.positions, self.cache, first_adapted_row, with_logits)
        self.positions += tokens.shape[1]
        return out

    @torch.inference_mode()
    def reorder(self, index: Tensor) -> None:
        """Let row i continue from former row index[i]; int64, at most `max_rows` of them."""
        self.cache.reorder(index, int(self.positions.max()))
        self._set_positions(self.positions[index], len(index))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the model's own head, with its softcap and scale: `[rows, H]` -> `[rows, V]`."""
        return self._scaled(self.model.get_output_embeddings()(hidden))

    def _scaled(self, x: Tensor) -> Tensor:
        """Apply the scale and softcap of the model's logits."""
        config = self.model.config
        scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        x = x if scale == 1 else x * scale
        return softcapped(x, softcap)

    @functools.cached_property
    def _cache_argument(self) -> str:
        """The decoder's name for its cache: transformers 5.24 renamed it."""
        names = inspect.signature(self.model.get_decoder().forward).parameters
        return "cache" if "cache" in names else "past_key_values"

    @property
    def lengths_on_device(self) -> bool:
        """Whether steps read rows' lengths on the device, so that one graph serves all lengths."""
        return self.native is not None and self.native.lengths_on_device

    @property
    def memory_key(self) -> tuple[int, int]:
        """A value that changes when tensors that outlive a request are allocated anew."""
        return self.cache.allocations, self._position_buffer.data_ptr()

    def _set_positions(self, positions: Tensor, max_rows: int) -> None:
        """Copy into a buffer that stays, because a captured step advances it in place."""
        if len(self._position_buffer) < max_rows:
            self._position_buffer = torch.empty(
                max_rows, dtype=torch.int64, device=self.model.device
            )
        self.positions = self._position_buffer[: len(positions)].copy_(positions)

    def _forward(
        self, positions: Tensor, kv_length: int, start: int | None, **inputs: Tensor
    ) -> Tensor:
        self.cache.place(positions, kv_length, start)
        mask = None  # rows alike and a single token, which sees every slot
        if start is None or positions.shape[1] > 1:
            alike = positions if start is None else positions[:1]
            mask = causal_mask(alike, kv_length, self.model.dtype)
        from_first = start == 0 and kv_length == positions.shape[1]
        with causal(mask if from_first else None):
            return self.model.get_decoder()(
                attention_mask=mask,
                use_cache=True,
                **{self._cache_argument: self.cache},
                **inputs,
            ).last_hidden_state
