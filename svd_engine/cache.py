"""A KV cache in which every row keeps its own place."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values `[rows, kv_heads, slots, head_dim]` a layer, written at per-row positions.

    A Hugging Face model accepts any object with `update` and `get_seq_length`. Before each forward
    pass `place` says where its tokens go. What lies in slots past a row's own position is hidden
    from the row and overwritten when it gets there, so ragged prompts are padded on the right and
    rows need no alignment. Buffers outlive a call and grow when they must.
    """

    is_compileable = False

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._rows = self._slots = 0
        self._live = 0
        self._start: int | None = 0
        self._positions = torch.empty(0, 0, dtype=torch.int64)
        self._row_index = torch.empty(0, 1, dtype=torch.int64)

    def reserve(self, rows: int, slots: int) -> None:
        """Make room for `rows` sequences of up to `slots` positions; drops what is stored."""
        if rows > self._rows or slots > self._slots:
            self._rows, self._slots = max(rows, self._rows), max(slots, self._slots)
            self._layers.clear()

    def place(self, positions: Tensor, live: int, start: int | None) -> None:
        """The next tokens go to `positions` `[rows, q]` int64; slots from `live` on are unused.

        start: the slot of the first token where all rows write the same slots, else None.
        """
        self._positions, self._live, self._start = positions, live, start
        if start is None:
            self._row_index = torch.arange(len(positions), device=positions.device)[:, None]

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Store `[rows, kv_heads, q, head_dim]` and return all live slots of the same rows."""
        rows, heads, length, _ = keys.shape
        if layer_idx not in self._layers:
            self._layers[layer_idx] = (
                keys.new_zeros(self._rows, heads, self._slots, keys.shape[-1]),
                values.new_zeros(self._rows, heads, self._slots, values.shape[-1]),
            )
        for buffer, new in zip(self._layers[layer_idx], (keys, values), strict=True):
            if self._start is not None:
                buffer[:rows, :, self._start : self._start + length] = new
            else:
                buffer[self._row_index, :, self._positions] = new.transpose(1, 2)
        stored_keys, stored_values = self._layers[layer_idx]
        return stored_keys[:rows, :, : self._live], stored_values[:rows, :, : self._live]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._live
