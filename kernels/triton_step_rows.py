"""What follows a linear layer of a decoder: norms with the residual, the gate, rotary embedding.

Each kernel adds up the parts that `linear_tiles` left, and goes on with them.
"""

import triton
import triton.language as tl

from .triton_linear import finished, load_columns, prefetch, prefetch_finish, wait_for_kernel_before
from .triton_rows import kernel


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x as a tensor of that dtype would hold it."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def normalised(x, square_sum, weight, size, eps, offset):
    """The RMSNorm of x, whose squares sum to `square_sum` over `size` elements."""
    return x / tl.sqrt(square_sum / size + eps) * (weight.to(tl.float32) + offset)


@triton.jit
def store_columns(row, column, x, inside, ALIGNED: tl.constexpr):
    """Store the columns of a row, by 16 bytes where that is ALIGNED."""
    pointers = row + column
    if ALIGNED:
        pointers = tl.multiple_of(pointers, 16)
    tl.store(pointers, x, inside)


@kernel
def finish_norm(
    parts,
    rows: tl.int32,
    outputs: tl.int32,
    first_adapted: tl.int32,
    biases,
    up,
    scale,
    after,
    after_eps: tl.float32,
    after_offset: tl.float32,
    residual,
    residual_scale: tl.float32,
    before,
    before_eps: tl.float32,
    before_offset: tl.float32,
    stream,
    normal,
    SPLITS: tl.constexpr,
    LAYERS: tl.constexpr,
    RANK: tl.constexpr,
    SCALED: tl.constexpr,
    AFTER: tl.constexpr,
    BEFORE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program per row: stream = residual + norm(x W^T) * residual_scale; normal = norm(stream).

    Without splits stream = residual. AFTER, BEFORE: whether there are these norms.
    """
    row = tl.program_id(0)
    column = tl.arange(0, TILE)
    inside = column < (outputs // 8 * 8 if ALIGNED else outputs)
    at = tl.cast(row, tl.int64) * outputs
    dtype = stream.dtype.element_ty
    if OVERLAP:
        line = tl.arange(0, TILE // 32) * 32
        if BEFORE:
            prefetch(before, 0, tl.arange(0, 1), 1, line, outputs)
        if AFTER:
            prefetch(after, 0, tl.arange(0, 1), 1, line, outputs)
        if SPLITS > 0:
            prefetch_finish(biases, up, 0, outputs, RANK, TILE, OVERLAP)
    wait_for_kernel_before(OVERLAP)
    x = load_columns(residual + at, column, inside, ALIGNED).to(tl.float32)
    if BEFORE:
        before_weight = load_columns(before, column, inside, ALIGNED)
    if SPLITS > 0:
        if AFTER:
            after_weight = load_columns(after, column, inside, ALIGNED)
        y = finished(
            parts, rows, row, column, inside, outputs, 0, row >= first_adapted, biases, up, scale,
            SPLITS, LAYERS, RANK, SCALED, ALIGNED,
        )  # fmt: skip
        y = rounded(y, dtype)
        if AFTER:
            y = normalised(y, tl.sum(y * y), after_weight, outputs, after_eps, after_offset)
            y = rounded(y, dtype)
        x = rounded(x + y * residual_scale, dtype)
    store_columns(stream + at, column, x.to(dtype), inside, ALIGNED)
    if BEFORE:
        x = normalised(x, tl.sum(x * x), before_weight, outputs, before_eps, before_offset)
    store_columns(normal + at, column, x.to(dtype), inside, ALIGNED)


@triton.jit
def tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@kernel
def finish_gate(
    parts,
    rows: tl.int32,
    outputs: tl.int32,
    first_adapted: tl.int32,
    biases,
    up,
    scale,
    input_scale,
    out,
    SPLITS: tl.constexpr,
    LAYERS: tl.constexpr,
    RANK: tl.constexpr,
    SCALED: tl.constexpr,
    INPUT_SCALED: tl.constexpr,
    GELU: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program per tile of a row: act(gate) * up, and in adapted rows * input_scale."""
    size = outputs // 2
    tiles = tl.cdiv(size, TILE)
    row = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * TILE
    column = first + tl.arange(0, TILE)
    inside = column < size
    prefetch_finish(biases, up, first, outputs, RANK, TILE, OVERLAP)
    prefetch_finish(biases, up, size + first, outputs, RANK, TILE, OVERLAP)
    wait_for_kernel_before(OVERLAP)
    adapted = row >= first_adapted
    gate = finished(
        parts, rows, row, column, inside, outputs, 0, adapted, biases, up, scale,
        SPLITS, LAYERS, RANK, SCALED,
    )  # fmt: skip
    value = finished(
        parts, rows, row, size + column, inside, outputs, 1, adapted, biases, up, scale,
        SPLITS, LAYERS, RANK, SCALED,
    )  # fmt: skip
    dtype = out.dtype.element_ty
    gate = rounded(gate, dtype)
    if GELU:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        gate = 0.5 * gate * (1.0 + tanh(inner))
    else:
        gate = gate / (1.0 + tl.exp(-gate))
    result = rounded(gate, dtype) * rounded(value, dtype)
    if INPUT_SCALED:
        factor = tl.load(input_scale + column, column < tl.where(adapted, size, 0), other=1.0)
        result = rounded(result, dtype) * factor.to(tl.float32)
    tl.store(out + tl.cast(row, tl.int64) * size + column, result.to(dtype), inside)


@kernel
def finish_heads(
    parts,
    rows: tl.int32,
    outputs: tl.int32,
    first_adapted: tl.int32,
    biases,
    up,
    scale,
    positions,
    new: tl.int32,
    slots,
    cos,
    sin,
    rotary_dim: tl.int32,
    query_norm,
    query_eps: tl.float32,
    query_offset: tl.float32,
    key_norm,
    key_eps: tl.float32,
    key_offset: tl.float32,
    query,
    keys,
    values,
    heads: tl.int32,
    kv_heads: tl.int32,
    SPLITS: tl.constexpr,
    LAYERS: tl.constexpr,
    RANK: tl.constexpr,
    SCALED: tl.constexpr,
    NORM: tl.constexpr,
    ACROSS: tl.constexpr,
    DIM: tl.constexpr,
    LANES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program per head of a token: q to `query` `[rows, heads, DIM]`, k and v to the cache.

    Row i is token i % new of sequence i // new. keys, values: `[sequences, kv_heads, slots, DIM]`.
    cos, sin: `[positions, rotary_dim]`.
    """
    every = heads + 2 * kv_heads
    row = tl.program_id(0) // every
    head = tl.program_id(0) % every
    sequence = row // new
    prefetch_finish(biases, up, head * DIM, outputs, RANK, LANES, OVERLAP)
    wait_for_kernel_before(OVERLAP)
    room = tl.load(slots)
    position = tl.load(positions + sequence) + row % new
    kept = tl.where(position < room, DIM, 0)  # nothing is written past the room
    lane = tl.arange(0, LANES)
    inside = lane < DIM
    adapted = row >= first_adapted
    is_value = head >= heads + kv_heads
    is_key = (head >= heads) & (head < heads + kv_heads)
    layer = (head >= heads).to(tl.int32) + is_value.to(tl.int32)
    dtype = query.dtype.element_ty
    half = rotary_dim // 2
    turned = lane < tl.where(is_value, 0, rotary_dim)
    other = tl.where(lane < half, lane + half, lane - half)
    angle = tl.minimum(position, room - 1) * rotary_dim + lane
    c = tl.load(cos + angle, turned, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, turned, other=0.0).to(tl.float32)
    x = finished(
        parts, rows, row, head * DIM + lane, inside, outputs, layer, adapted, biases, up, scale,
        SPLITS, LAYERS, RANK, SCALED,
    )  # fmt: skip
    x = rounded(x, dtype)
    y = finished(
        parts, rows, row, head * DIM + other, turned, outputs, layer, adapted, biases, up, scale,
        SPLITS, LAYERS, RANK, SCALED,
    )  # fmt: skip
    y = rounded(y, dtype)
    if NORM:
        if not is_value:
            weight, eps, offset, of, begin = query_norm, query_eps, query_offset, heads, heads * 0
            if is_key:
                weight, eps, offset, of, begin = key_norm, key_eps, key_offset, kv_heads, heads
            squares = tl.sum(x * x)
            size, at = heads * 0 + DIM, heads * 0
            if ACROSS:
                squares *= 0.0
                for one in range(0, of):
                    z = finished(
                        parts, rows, row, (begin + one) * DIM + lane, inside, outputs, layer,
                        adapted, biases, up, scale, SPLITS, LAYERS, RANK, SCALED,
                    )  # fmt: skip
                    z = rounded(z, dtype)
                    squares += tl.sum(z * z)
                size, at = of * DIM, (head - begin) * DIM
            w = tl.load(weight + at + lane, inside, other=0.0)
            x = rounded(normalised(x, squares, w, size, eps, offset), dtype)
            w = tl.load(weight + at + other, turned, other=0.0)
            y = rounded(normalised(y, squares, w, size, eps, offset), dtype)
    turn = (x * c + tl.where(lane < half, -y, y) * s).to(dtype)
    if head < heads:
        place = tl.cast(row, tl.int64) * heads + head
        tl.store(query + place * DIM + lane, turn, inside)
    else:
        cache = keys
        if is_value:
            cache = values
        kv_head = head - heads - tl.where(is_value, kv_heads, 0)
        place = (tl.cast(sequence, tl.int64) * kv_heads + kv_head) * room + position
        tl.store(cache + place * DIM + lane, turn, lane < kept)
