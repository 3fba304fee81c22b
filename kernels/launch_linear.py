"""Host side of the few-rows linear: tiles, programs, and the memory between its two passes.

The caller has checked the arguments. Nothing is read back from the device, so every call can be
captured in a CUDA graph.
"""

import torch
from torch import Tensor

from .launch import STREAM_REGISTERS, aligned
from .triton_linear import RANKS, ROWS, SPLITS, linear_rows, linear_tiles

MOST_ROWS: int = ROWS.value
EVERY = 1 << 31
# (least outputs, outputs per program, tiles of weights in flight, columns per program). With few
# programs each keeps more tiles in flight, and with long sums as well, splitting the columns is
# worth a second pass. The number of rows does not enter, so a row's bits do not depend on it.
TILES = ((8192, 32, 5, EVERY), (4096, 16, 5, EVERY), (2048, 16, 9, EVERY), (0, 16, 9, 3072))
IN_BYTES = 256  # of one output's weights, per tile
SUM_TILE = 256


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    first: int,
    out: Tensor,
) -> None:
    """out = reference.linear(x, weight, ...), rounded once, for at most MOST_ROWS rows.

    x `[M, in]`, weight `[out, in]` and out `[M, out]` share one dtype: float32, bfloat16 or
    float16; each of the others may have any of them. Matrices have last stride 1.
    """
    (rows, fan_in), fan_out = x.shape, len(weight)
    assert rows <= MOST_ROWS, f"x: {rows} rows, {MOST_ROWS} at most"
    if rows == 0 or fan_out == 0:
        return
    low_rank = down is not None and up is not None and first < rows
    if not low_rank:  # unread, and no dtype that would compile anything else
        down, up, up_bias, first = weight, weight, None, rows
    assert down is not None and up is not None
    rank = len(down) if low_rank else 0

    out_tile, stages, columns = next(tile for least, *tile in TILES if fan_out >= least)
    splits = min(SPLITS.value, max(1, -(-fan_in // columns)))
    whole = splits == 1 and not low_rank
    parts = out
    if not whole:
        parts = torch.empty(splits * rows, fan_out + rank, dtype=torch.float32, device=x.device)
    tiles = -(-fan_out // out_tile) + (rows - first) * -(-rank // RANKS.value)
    wide = aligned(x, weight, down)
    biases = *_sized(bias, weight), *_sized(up_bias, weight)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        linear_tiles[(tiles * splits,)](
            x, x.stride(0), weight, weight.stride(0), *biases[:2], down, down.stride(0),
            parts, parts.stride(0), rows, fan_in, fan_out, first, rank, splits,
            WHOLE=whole, ALIGNED=wide, OUT_TILE=out_tile, IN_TILE=IN_BYTES // weight.itemsize,
            STAGES=stages if wide else 1, num_warps=out_tile // 8, enable_fp_fusion=True,
            # Bounded only where it has to be: given room, ptxas takes it, and spills besides.
            maxnreg=None if wide else STREAM_REGISTERS,
        )  # fmt: skip
        if not whole:
            linear_rows[(rows * -(-fan_out // SUM_TILE),)](
                parts, up, up.stride(0), *biases, out, out.stride(0),
                rows, fan_out, first, rank, splits,
                TILE=SUM_TILE, num_warps=4, maxnreg=STREAM_REGISTERS, enable_fp_fusion=True,
            )  # fmt: skip


def _sized(bias: Tensor | None, unread: Tensor) -> tuple[Tensor, int]:
    return (unread, 0) if bias is None else (bias.contiguous(), len(bias))
