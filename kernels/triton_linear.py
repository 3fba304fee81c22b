"""A linear layer of a few rows with an adapter's low-rank term: every weight is read once.

`linear_tiles` multiplies a tile of rows of the weight by all rows of x, padded with zero rows to
the 16 that tensor cores take: the bits of a row do not depend on the number of rows. Where one
program per tile would be too few, the columns are split among several; each writes its part of the
sums, with down x in extra columns beside them, and `linear_rows` adds the parts in a fixed order.
There are no atomics.
"""

import os

import triton
import triton.language as tl

from .triton_rows import kernel

ROWS = tl.constexpr(16)
RANKS = tl.constexpr(8)  # of the adapter's r dimensions, per program of `down`
SPLITS = tl.constexpr(8)  # at most
# The interpreter computes with numpy, which has no bfloat16.
NO_BFLOAT16 = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def load_tile(matrix, stride, row, rows, column, columns, ALIGNED: tl.constexpr):
    """Load matrix[row, column], zeros outside."""
    places = matrix + row.to(tl.int64)[:, None] * stride + column[None, :]
    if ALIGNED:
        # Both hold for the caller's tensors; this tells the compiler, as in triton_rows.locate.
        places = tl.multiple_of(places, (1, 16))
        columns = columns // 8 * 8
    return tl.load(places, (row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def times_weight(
    x, x_stride, rows, weight, weight_stride, output, outputs, begin, end, fan_in,
    ALIGNED: tl.constexpr, IN_TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x W^T summed over the columns [begin, end), for all rows and the given outputs."""
    row = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, output.shape[0]), tl.float32)
    for start in tl.range(begin, end, IN_TILE, num_stages=STAGES):
        column = start + tl.arange(0, IN_TILE)
        part = load_tile(x, x_stride, row, rows, column, fan_in, ALIGNED)
        w = load_tile(weight, weight_stride, output, outputs, column, fan_in, ALIGNED)
        if NO_BFLOAT16:
            part = part.to(tl.float32)
            w = w.to(tl.float32)
        total = tl.dot(part, tl.trans(w), total, input_precision="ieee")
    return total


@triton.jit
def times_down(
    x, down, down_stride, dimension, rank, begin, end, fan_in,
    ALIGNED: tl.constexpr, IN_TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x down^T over the same columns for one row, in float32 for any dtype of the adapter."""
    products = tl.zeros((RANKS, IN_TILE), tl.float32)
    # Triton pipelines loads that feed no `tl.dot` only if num_stages is given on the loop.
    for start in tl.range(begin, end, IN_TILE, num_stages=STAGES):
        column = start + tl.arange(0, IN_TILE)
        part = tl.load(x + column, column < fan_in, other=0.0).to(tl.float32)
        w = load_tile(down, down_stride, dimension, rank, column, fan_in, ALIGNED)
        products += part[None, :] * w.to(tl.float32)
    return tl.sum(products, 1)


@kernel
def linear_tiles(
    x,
    x_stride: tl.int64,
    weight,
    weight_stride: tl.int64,
    bias,
    bias_size: tl.int32,
    down,
    down_stride: tl.int64,
    out,
    out_stride: tl.int64,
    rows: tl.int32,
    fan_in: tl.int32,
    fan_out: tl.int32,
    first_adapted: tl.int32,
    rank: tl.int32,
    splits: tl.int32,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    OUT_TILE: tl.constexpr,
    IN_TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x W^T + bias for a tile of outputs if WHOLE; else a split's part of x W^T or of x down^T.

    Parts are float32 `[splits, rows, fan_out + rank]`. The last `rank` columns are x down^T, of the
    rows from `first_adapted` on.
    """
    split = tl.program_id(0) % splits
    tile = tl.program_id(0) // splits
    span = tl.cdiv(tl.cdiv(fan_in, IN_TILE), splits) * IN_TILE
    begin = split * span
    end = tl.minimum(begin + span, fan_in)
    out += tl.cast(split, tl.int64) * rows * out_stride
    tiles_per_row = tl.cdiv(rank, RANKS)
    down_tiles = (rows - first_adapted) * tiles_per_row

    if tile < down_tiles:
        down_row = tl.cast(first_adapted + tile // tiles_per_row, tl.int64)
        dimension = tile % tiles_per_row * RANKS + tl.arange(0, RANKS)
        sums = times_down(
            x + down_row * x_stride, down, down_stride, dimension, rank, begin, end, fan_in,
            ALIGNED, IN_TILE, STAGES,
        )  # fmt: skip
        tl.store(out + down_row * out_stride + fan_out + dimension, sums, dimension < rank)
    else:
        output = (tile - down_tiles) * OUT_TILE + tl.arange(0, OUT_TILE)
        inside = output < fan_out
        total = times_weight(
            x, x_stride, rows, weight, weight_stride, output, fan_out, begin, end, fan_in,
            ALIGNED, IN_TILE, STAGES,
        )  # fmt: skip
        if WHOLE:
            tile_bias = tl.load(bias + output, output < bias_size, other=0.0)
            total += tile_bias.to(tl.float32)[None, :]
        row = tl.arange(0, ROWS)
        places = out + row.to(tl.int64)[:, None] * out_stride + output[None, :]
        tl.store(places, total.to(out.dtype.element_ty), (row < rows)[:, None] & inside[None, :])


@triton.jit
def sum_parts(parts, step, splits, column, inside):
    """Sum the parts of all splits, which are loaded at once and added in a fixed order."""
    split = tl.arange(0, SPLITS)
    places = parts + split.to(tl.int64)[:, None] * step + column[None, :]
    return tl.sum(tl.load(places, (split < splits)[:, None] & inside[None, :], other=0.0), 0)


@kernel
def linear_rows(
    parts,
    up,
    up_stride: tl.int64,
    bias,
    bias_size: tl.int32,
    up_bias,
    up_bias_size: tl.int32,
    out,
    out_stride: tl.int64,
    rows: tl.int32,
    fan_out: tl.int32,
    first_adapted: tl.int32,
    rank: tl.int32,
    splits: tl.int32,
    TILE: tl.constexpr,
):
    """One program per tile of a row: the sum of its parts, + bias, and from row `first_adapted` on
    + (x down^T) up^T + up_bias."""
    tiles = tl.cdiv(fan_out, TILE)
    row = tl.cast(tl.program_id(0) // tiles, tl.int64)
    output = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    inside = output < fan_out
    width = tl.cast(fan_out, tl.int64) + rank
    parts += row * width
    total = sum_parts(parts, rows * width, splits, output, inside)
    total += tl.load(bias + output, output < bias_size, other=0.0).to(tl.float32)
    if row >= first_adapted:
        for start in range(0, rank, RANKS):
            dimension = start + tl.arange(0, RANKS)
            in_rank = dimension < rank
            down_x = sum_parts(parts + fan_out, rows * width, splits, dimension, in_rank)
            w = load_tile(up, up_stride, output, fan_out, dimension, rank, False)
            total += tl.sum(w.to(tl.float32) * down_x[None, :], 1)
        total += tl.load(up_bias + output, output < up_bias_size, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + output, total.to(out.dtype.element_ty), inside)
