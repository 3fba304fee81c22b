"""Host side of a decode step: what is launched for each part of a layer, and with which tiles.

The caller has checked the arguments. Nothing is read back from the device, and what differs from
step to step (positions, lengths, the room in the cache) is read from it, so one CUDA graph serves
every step of as many rows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch import ROW_REGISTERS, STREAM_REGISTERS
from .launch_linear import Joined, multiply, overlap, parts_size
from .triton_step_attend import SPLITS, attend_rows, attend_tiles
from .triton_step_rows import finish_gate, finish_heads, finish_norm

GATE_TILE = 256
BLOCK_BYTES = 1 << 13  # of keys at once
LEAST_DOT = 16  # rows that a matrix product takes


class Norm(NamedTuple):
    """An RMSNorm: x / rms(x) * (weight + offset)."""

    weight: Tensor
    eps: float
    offset: float


class Heads(NamedTuple):
    """The shapes of a layer's attention, and its norms of queries and keys."""

    heads: int
    kv_heads: int
    dim: int
    scaling: float
    window: int  # 0 is none
    softcap: float  # 0 is none
    query_norm: Norm | None
    key_norm: Norm | None

    @property
    def lanes(self) -> int:
        return max(LEAST_DOT, _power(self.dim))

    def block(self, dtype: torch.dtype) -> int:
        """Slots per block of keys."""
        return max(LEAST_DOT, BLOCK_BYTES // (self.lanes * dtype.itemsize))


class Places(NamedTuple):
    """Where the new tokens go: all on the device."""

    positions: Tensor  # int64 [sequences], of each one's first new token
    new: int  # tokens per sequence
    slots: Tensor  # int64 [1], the room of a row in the cache
    first_adapted: int  # row, of sequences * new


class Parts(NamedTuple):
    """The product of a linear layer that is yet to be finished."""

    sums: Tensor
    joined: Joined
    splits: int


def workspace_size(rows: int, joined: list[Joined]) -> int:
    """Return how many float32 elements any of these layers leaves behind."""
    return max(parts_size(x, rows) for x in joined)


def product(x: Tensor, joined: Joined, workspace: Tensor) -> Parts:
    """Multiply `[rows, in]` by joined layers."""
    return Parts(workspace, joined, multiply(x, joined, workspace))


def finish_with_norm(
    parts: Parts | None,
    after: Norm | None,
    residual: Tensor,
    residual_scale: float,
    before: Norm | None,
    first_adapted: int,
    stream: Tensor,
    normal: Tensor,
) -> None:
    """stream = residual + after(x W^T) * residual_scale; normal = before(stream).

    All `[rows, H]`, contiguous; stream may be the residual. Without parts stream = residual.
    """
    rows, outputs = residual.shape
    tile = _power(outputs)
    warps = min(16, max(4, tile // 256))
    weights = [x.weight for x in (after, before) if x is not None]
    wide = outputs % 8 == 0 and all(x.data_ptr() % 16 == 0 for x in (residual, stream, *weights))
    with torch.cuda.device_of(residual):
        finish_norm[(rows,)](
            *_finish(parts, rows, outputs, first_adapted, residual),
            *_norm(after, residual), residual, residual_scale, *_norm(before, residual),
            stream, normal, **_forms(parts), AFTER=after is not None, BEFORE=before is not None,
            ALIGNED=wide, TILE=tile, num_warps=warps, enable_fp_fusion=True, **overlap(residual),
            maxnreg=STREAM_REGISTERS if warps == 16 else None,  # without a bound it spills
        )  # fmt: skip


def finish_with_gate(
    parts: Parts, is_gelu: bool, input_scale: Tensor | None, first_adapted: int, out: Tensor
) -> None:
    """out `[rows, inner]` = act(gate) * up * input_scale, the last in adapted rows."""
    rows, size = out.shape
    with torch.cuda.device_of(out):
        finish_gate[(rows * -(-size // GATE_TILE),)](
            *_finish(parts, rows, 2 * size, first_adapted, out),
            out if input_scale is None else input_scale, out, **_forms(parts),
            INPUT_SCALED=input_scale is not None, GELU=is_gelu, TILE=GATE_TILE, num_warps=4,
            maxnreg=STREAM_REGISTERS, enable_fp_fusion=True, **overlap(out),
        )  # fmt: skip


def finish_with_heads(
    parts: Parts,
    form: Heads,
    places: Places,
    tables: tuple[Tensor, Tensor] | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Normalise and rotate queries and keys; write them, and the values, where they go.

    tables: cos and sin `[positions, rotary_dim]`, or None where nothing is rotated. query: `[rows,
    heads, dim]`; keys, values: `[sequences, kv_heads, slots, dim]`; all contiguous.
    """
    rows = len(query)
    cos, sin = tables or (query, query)
    across = form.query_norm is not None and len(form.query_norm.weight) > form.dim
    with torch.cuda.device_of(query):
        finish_heads[(rows * (form.heads + 2 * form.kv_heads),)](
            *_finish(parts, rows, parts.joined.outputs, places.first_adapted, query),
            places.positions, places.new, places.slots,
            cos, sin, cos.shape[1] if tables else 0,
            *_norm(form.query_norm, query), *_norm(form.key_norm, query),
            query, keys, values, form.heads, form.kv_heads, **_forms(parts),
            NORM=form.query_norm is not None, ACROSS=across, DIM=form.dim, LANES=form.lanes,
            num_warps=1, enable_fp_fusion=True, **overlap(query),
        )  # fmt: skip


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    form: Heads,
    places: Places,
    input_scale: Tensor | None,
    workspace: Tensor,
    out: Tensor,
) -> None:
    """out `[rows, heads, dim]`: attention of every token over its own and earlier slots.

    workspace: float32, `attention_size` elements.
    """
    rows = len(query)
    block = form.block(keys.dtype)
    sizes = dict(DIM=form.dim, LANES=form.lanes, BLOCK=block)
    count = rows * form.heads * SPLITS.value
    peaks, sums = workspace[: 2 * count], workspace[2 * count :]
    group = max(LEAST_DOT, _power(form.heads // form.kv_heads))
    aligned = form.dim * keys.itemsize % 16 == 0 and form.dim % 8 == 0
    # Of larger blocks two at once: two programs of a multiprocessor share its memory.
    stages = 3 if block * form.lanes * keys.itemsize <= BLOCK_BYTES else 2
    with torch.cuda.device_of(query):
        attend_tiles[(rows * form.kv_heads * SPLITS.value,)](
            query, keys, values, places.positions, places.new, places.slots, form.window,
            form.heads, form.kv_heads, form.scaling, form.softcap, sums, peaks,
            SOFTCAP=form.softcap > 0, ALIGNED=aligned, GROUP=group, **sizes,
            STAGES=stages if aligned else 1, num_warps=4 if keys.itemsize == 2 else 8,
            enable_fp_fusion=True, **overlap(query),
        )  # fmt: skip
        attend_rows[(rows * form.heads,)](
            sums, peaks, places.positions, places.new, places.slots, form.window, form.heads,
            places.first_adapted, out if input_scale is None else input_scale, out,
            INPUT_SCALED=input_scale is not None, **sizes, num_warps=4, maxnreg=ROW_REGISTERS,
            enable_fp_fusion=True, **overlap(query),
        )  # fmt: skip


def attention_size(rows: int, form: Heads) -> int:
    """Return how many float32 elements `attend` needs."""
    return rows * form.heads * SPLITS.value * (2 + form.dim)


def _finish(
    parts: Parts | None, rows: int, outputs: int, first_adapted: int, unread: Tensor
) -> tuple[Any, ...]:
    """What every kernel that finishes a product takes first."""
    if parts is None:
        return unread, rows, outputs, rows, unread, unread, unread
    return parts.sums, rows, outputs, first_adapted, *parts.joined.finish_tensors


def _forms(parts: Parts | None) -> dict[str, Any]:
    if parts is None:
        return {"SPLITS": 0, "LAYERS": 1, "RANK": 0, "SCALED": False}
    return parts.joined.finish(parts.splits)


def _norm(norm: Norm | None, unread: Tensor) -> tuple[Any, ...]:
    return (unread, 0.0, 0.0) if norm is None else norm


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()
