"""The second pass of `steer` and `steering_vector`."""

import triton.language as tl

from .triton_measure import is_active, numbers, row_and_tile, steer_row_of_tile
from .triton_rows import (
    INF,
    Rows,
    delta_of,
    kernel,
    load_tile,
    locate,
    per_row,
    steered,
    wait_for_first_pass,
)


@kernel
def steer_tiles(
    adapted,
    adapted_stride: tl.int64,
    base,
    base_stride: tl.int64,
    workspace,
    vocab: tl.int32,
    combined: tl.int32,
    strength: tl.float32,
    strengths,
    per_strength: tl.int32,
    log_alpha: tl.float32,
    penalty: tl.float32,
    difference: tl.int32,
    out,
    out_stride: tl.int64,
    reciprocal: tl.uint32,
    shift: tl.uint32,
    REMOVE: tl.constexpr,
    DELTA: tl.constexpr,
    PDL: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per tile: write steered logits, or delta; fill a tile without a token left."""
    wait_for_first_pass(PDL)
    count = tl.cdiv(vocab, TILE)
    row, tile = row_and_tile(count, reciprocal, shift)
    token = tile * TILE + tl.arange(0, TILE)
    place, inside = locate(out, out_stride, row, token, vocab, ALIGNED)

    # Before the statistics of the row, so that a program waits for one reading only.
    peak = tl.load(numbers(workspace, row, count) + tile)
    row_strength = per_row(strength, strengths, per_strength, row)
    steering = steer_row_of_tile(
        workspace, row, vocab, combined, row_strength, log_alpha, penalty, difference, LANES, TILE
    )
    if is_active(peak, steering, REMOVE):
        rows = Rows(adapted, adapted_stride, base, base_stride, vocab)
        z, b = load_tile(rows, row, token, ALIGNED)
        if DELTA:
            values = delta_of(z, b, steering)
        else:
            values = steered(z, b, steering, REMOVE)
        tl.store(place, values.to(out.dtype.element_ty), inside)
    else:
        empty = 0.0 if DELTA else -INF
        fill = tl.zeros((TILE,), tl.float32) + tl.where(
            steering.peak == steering.peak, empty, float("nan")
        )
        tl.store(place, fill.to(out.dtype.element_ty), inside)
