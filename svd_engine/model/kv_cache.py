"""A KV cache in which every row has its own position."""

import math
from typing import Any

import torch
from torch import Tensor


class KVCache:
    """Keys and values `[rows, kv_heads, slots, head_dim]` per layer, written at per-row positions.

    A Hugging Face model accepts any object with `update` and `get_seq_length`. Before each forward
    pass `place` says where its tokens go. Slots past a row's position are masked and overwritten
    later, so ragged prompts are right-padded and rows need no alignment. Memory outlives a call: a
    request that needs no more of it, in whatever shape, gets the same memory.
    """

    is_compileable = False

    def __init__(self) -> None:
        self.allocations = 0
        self.layout = object()  # another one whenever memory is laid out anew
        self.first_row = 0  # of the batch in the memory
        self._memory: dict[tuple[int, str], Tensor] = {}
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # views of the memory
        self._max_rows = self.slots = self._kv_length = 0
        self._start: int | None = 0
        self._positions = torch.empty(0, 0, dtype=torch.int64)
        self._row_index = torch.empty(0, 1, dtype=torch.int64)

    def reserve(self, max_rows: int, slots: int) -> None:
        """Reserve `max_rows` rows of `slots` positions; drops what is stored."""
        self._max_rows, self.slots = max_rows, slots
        self._layers.clear()
        self.layout = object()

    def place(self, positions: Tensor, kv_length: int, start: int | None) -> None:
        """Set the `positions` `[rows, q]` int64 of the next tokens, all below `kv_length`.

        start: slot of the first token where all rows write the same slots, else None.
        """
        self._positions, self._kv_length, self._start = positions, kv_length, start
        if start is None:
            rows = torch.arange(len(positions), device=positions.device)
            self._row_index = (rows + self.first_row)[:, None]

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Store `[rows, kv_heads, q, head_dim]`; return the same rows' first `kv_length` slots."""
        length = keys.shape[2]
        rows = slice(self.first_row, self.first_row + len(keys))
        stored = self._layer(layer_idx, keys, values)
        for buffer, new in zip(stored, (keys, values), strict=True):
            if self._start is not None:
                buffer[rows, :, self._start : self._start + length] = new
            else:
                buffer[self._row_index, :, self._positions] = new.transpose(1, 2)
        return stored[0][rows, :, : self._kv_length], stored[1][rows, :, : self._kv_length]

    def make_layer(self, layer_idx: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        """Let a layer have its memory, on the CPU, before anything is stored."""
        like = torch.empty(0, kv_heads, 0, head_dim, dtype=dtype)
        self._layer(layer_idx, like, like)

    def fill(self, keys: Tensor, values: Tensor, layer_idx: int, first_row: int, end: int) -> None:
        """Store `[kv_heads, q, head_dim]` in slots end - q .. end - 1 of rows `first_row`.. ."""
        stored = self._layer(layer_idx, keys[None], values[None])
        for buffer, new in zip(stored, (keys, values), strict=True):
            buffer[first_row:, :, end - new.shape[1] : end] = new

    def take(self, row: int, end: int) -> list[tuple[Tensor, Tensor]]:
        """Copy the first `end` slots of a row, `[kv_heads, end, head_dim]` per layer."""
        return [
            (keys[row, :, :end].clone(), values[row, :, :end].clone())
            for _, (keys, values) in sorted(self._layers.items())
        ]

    def put(self, row: int, end: int, layers: list[tuple[Tensor, Tensor]]) -> None:
        """Store the first `end` slots of what was taken in the same slots of a row."""
        for index, new in enumerate(layers):
            for buffer, x in zip(self._layer(index, new[0][None], new[1][None]), new, strict=True):
                buffer[row, :, :end] = x[:, :end]

    def reorder(self, index: Tensor, kv_length: int) -> None:
        """Copy the first `kv_length` slots of former row index[i] to row i. Raise ValueError."""
        if len(index) > self._max_rows:
            raise ValueError(
                f"index has {len(index)} rows; there is room for {self._max_rows}. "
                "Prefill with more."
            )
        moved = (index != torch.arange(len(index), device=index.device)).nonzero()[:, 0]
        for pair in self._layers.values():
            for buffer in pair:
                buffer[moved, :, :kv_length] = buffer[index[moved], :, :kv_length]

    def stored(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values from the batch's first row on, contiguous.

        Their shape is `[rows, kv_heads, slots, head_dim]`.
        """
        keys, values = self._layers[layer_idx]
        return keys[self.first_row :], values[self.first_row :]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a cache of keys and values has no {name}, which the model asks for")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._kv_length

    def _layer(self, layer_idx: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if layer_idx not in self._layers:
            self._layers[layer_idx] = (
                self._zeros((layer_idx, "keys"), keys),
                self._zeros((layer_idx, "values"), values),
            )
        return self._layers[layer_idx]

    def _zeros(self, name: tuple[int, str], like: Tensor) -> Tensor:
        """Zeros `[max_rows, kv_heads, slots, head_dim]` in the memory of that name.

        Zeros, because a masked slot has weight 0 and 0 * NaN, left by another request, is NaN.
        """
        shape = (self._max_rows, like.shape[1], self.slots, like.shape[3])
        size = math.prod(shape)
        memory = self._memory.get(name)
        if memory is None or len(memory) < size or memory.dtype != like.dtype:
            self.allocations += 1
            memory = self._memory[name] = like.new_zeros(size)
        else:
            memory[:size].zero_()
        return memory[:size].view(shape)
