"""Linear layers of a few rows with an adapter's low-rank term: every weight is read once.

`linear_tiles` multiplies tiles of rows of up to three weights of one input, and of the adapter's
`down` beside them, by blocks of rows of x, padded with zero rows to the 16 that tensor cores take:
the bits of a row do not depend on the number of rows. Where one program per tile would be too few,
the columns are split among several. Each writes its part of the sums; the kernel that needs them
adds them in a fixed order and finishes them by `finished`. There are no atomics.
"""

import os

import triton
import triton.language as tl

from .triton_rows import fetch_into_l2, kernel

# The interpreter computes with numpy, which has no bfloat16.
NO_BFLOAT16 = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def wait_for_kernel_before(OVERLAP: tl.constexpr):
    """Wait for the end of the kernel before; only then may the one after start.

    A program calls it before it reads or writes anything but by `prefetch`. So when a kernel gets
    past it, all kernels before have ended, not only the last.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(matrix, stride, row, rows, column, columns):
    """Bring cache lines into the L2 cache, where nothing is ever stale; the last for those beyond.

    column: one per line. Nothing is loaded, so this may come before what is awaited.
    """
    row, column = tl.minimum(row, rows - 1), tl.minimum(column, columns - 1)
    places = matrix + row.to(tl.int64)[:, None] * stride + column[None, :]
    fetch_into_l2(places)


@triton.jit
def prefetch_finish(
    biases, up, first, outputs, RANK: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr
):
    """Prefetch what `finished` reads for COLUMNS outputs from `first` on, besides the parts."""
    if OVERLAP:
        line = tl.arange(0, COLUMNS // 32)  # 128 bytes of float32
        prefetch(biases, outputs, tl.arange(0, 2), 2, first + 32 * line, outputs)
        if RANK > 0:
            prefetch(up, outputs, tl.arange(0, 16), RANK, first + 32 * line, outputs)


@triton.jit
def load_tile(matrix, stride, row, rows, column, columns, ALIGNED: tl.constexpr):
    """Load matrix[row, column], zeros outside."""
    places = matrix + row.to(tl.int64)[:, None] * stride + column[None, :]
    if ALIGNED:
        # Both hold for the caller's tensors; this tells the compiler, as in triton_rows.locate.
        places = tl.multiple_of(places, (1, 16))
        columns = columns // 8 * 8
    return tl.load(places, (row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@kernel
def linear_tiles(
    x,
    x_stride: tl.int64,
    weight0,
    stride0: tl.int64,
    outputs0: tl.int32,
    weight1,
    stride1: tl.int64,
    outputs1: tl.int32,
    weight2,
    stride2: tl.int64,
    outputs2: tl.int32,
    down,
    down_stride: tl.int64,
    ranks: tl.int32,
    parts,
    parts_stride: tl.int64,
    rows: tl.int32,
    fan_in: tl.int32,
    splits: tl.int32,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    OUT_TILE: tl.constexpr,
    IN_TILE: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """parts `[splits, rows, outputs0 + outputs1 + outputs2 + ranks]` = x [weights, down]^T, each
    over a split's columns."""
    blocks = tl.cdiv(rows, ROWS)
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks % splits
    tile = tl.program_id(0) // blocks // splits

    weight, stride, outputs, first = weight0, stride0, outputs0, outputs0 * 0
    tiles = tl.cdiv(outputs0, OUT_TILE)
    if tile >= tiles:
        tile -= tiles
        weight, stride, outputs, first = weight1, stride1, outputs1, outputs0
        tiles = tl.cdiv(outputs1, OUT_TILE)
        if tile >= tiles:
            tile -= tiles
            weight, stride, outputs, first = weight2, stride2, outputs2, outputs0 + outputs1
            tiles = tl.cdiv(outputs2, OUT_TILE)
            if tile >= tiles:
                tile -= tiles
                weight, stride, outputs = down, down_stride, ranks
                first = outputs0 + outputs1 + outputs2

    span = tl.cdiv(tl.cdiv(fan_in, IN_TILE), splits) * IN_TILE
    begin = split * span
    end = tl.minimum(begin + span, fan_in)
    row = block * ROWS + tl.arange(0, ROWS)
    output = tile * OUT_TILE + tl.arange(0, OUT_TILE)
    if OVERLAP:
        line = tl.arange(0, 16) * (IN_TILE // 2)  # 128 bytes
        prefetch(weight, stride, output, outputs, begin + line, end)
    wait_for_kernel_before(OVERLAP)
    total = tl.zeros((ROWS, OUT_TILE), tl.float32)
    for start in tl.range(begin, end, IN_TILE, num_stages=STAGES):
        column = start + tl.arange(0, IN_TILE)
        part = load_tile(x, x_stride, row, rows, column, fan_in, ALIGNED)
        w = load_tile(weight, stride, output, outputs, column, fan_in, ALIGNED)
        if NO_BFLOAT16:
            part = part.to(tl.float32)
            w = w.to(tl.float32)
        total = tl.dot(part, tl.trans(w), total, input_precision="ieee")
    at = (tl.cast(split, tl.int64) * rows + row)[:, None] * parts_stride
    places = parts + at + (first + output)[None, :]
    inside = (row < rows)[:, None] & (output < outputs)[None, :]
    tl.store(places, total.to(parts.dtype.element_ty), inside)


@triton.jit
def load_columns(row, column, inside, ALIGNED: tl.constexpr):
    """Load the columns of a row, zeros outside, by 16 bytes where that is ALIGNED."""
    pointers = row + column
    if ALIGNED:
        pointers = tl.multiple_of(pointers, 16)
    return tl.load(pointers, inside, other=0.0)


@triton.jit
def finished(
    parts, rows, row, column, inside, outputs, layer, adapted, biases, up, scale,
    SPLITS: tl.constexpr, LAYERS: tl.constexpr, RANK: tl.constexpr, SCALED: tl.constexpr,
    ALIGNED: tl.constexpr = False,
):  # fmt: skip
    """The outputs `column` of one row, all of joined layer number `layer`, in float32.

    biases: float32 `[2, outputs]`, of base and of adapted rows; up: `[RANK, outputs]`; scale:
    float32 `[outputs]`, of adapted rows. There is no branch, so all loads are under way at once.
    """
    width = outputs + LAYERS * RANK
    step = tl.cast(rows, tl.int64) * width
    parts += tl.cast(row, tl.int64) * width
    end = outputs // 8 * 8 if ALIGNED else outputs
    mine = inside & (column < tl.where(adapted, end, 0))
    bias = load_columns(biases + tl.where(adapted, outputs, 0), column, inside, ALIGNED)
    total = load_columns(parts, column, inside, ALIGNED)
    for split in tl.static_range(1, SPLITS):
        total += load_columns(parts + split * step, column, inside, ALIGNED)
    if SCALED:
        total *= tl.load(scale + column, mine, other=1.0)
    low_parts = parts + outputs + layer * RANK
    AT_ONCE: tl.constexpr = RANK if 0 < RANK and RANK <= 16 else (4 if RANK % 16 else 16)
    for start in range(0, RANK, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            low = tl.load(low_parts + start + i, adapted, other=0.0)
            for split in tl.static_range(1, SPLITS):
                low += tl.load(low_parts + split * step + start + i, adapted, other=0.0)
            w = load_columns(up + (start + i) * outputs, column, mine, ALIGNED)
            total += low * w.to(tl.float32)
    return total + bias


@kernel
def finish_rows(
    parts,
    rows: tl.int32,
    outputs: tl.int32,
    first_adapted: tl.int32,
    biases,
    up,
    scale,
    out,
    out_stride: tl.int64,
    SPLITS: tl.constexpr,
    LAYERS: tl.constexpr,
    RANK: tl.constexpr,
    SCALED: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program per tile of a row of one layer's outputs."""
    tiles = tl.cdiv(outputs, TILE)
    row = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * TILE
    column = first + tl.arange(0, TILE)
    inside = column < outputs
    prefetch_finish(biases, up, first, outputs, RANK, TILE, OVERLAP)
    wait_for_kernel_before(OVERLAP)
    total = finished(
        parts, rows, row, column, inside, outputs, 0, row >= first_adapted, biases, up, scale,
        SPLITS, LAYERS, RANK, SCALED,
    )  # fmt: skip
    place = out + tl.cast(row, tl.int64) * out_stride + column
    tl.store(place, total.to(out.dtype.element_ty), inside)
