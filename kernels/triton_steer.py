"""The second pass of `steer` and `steering_vector`."""

import triton.language as tl

from .triton_measure import is_active, steer_row
from .triton_rows import (
    INF,
    Rows,
    delta_of,
    kernel,
    load_tile,
    locate,
    only,
    per_row,
    steered,
)


@kernel
def steer_tiles(
    adapted,
    adapted_stride: tl.int64,
    base,
    base_stride: tl.int64,
    workspace,
    vocab: tl.int32,
    strength: tl.float32,
    strengths,
    per_strength: tl.int32,
    log_alpha: tl.float32,
    penalty: tl.float32,
    out,
    out_stride: tl.int64,
    REMOVE: tl.constexpr,
    DELTA: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per tile: write steered logits, or delta; fill a tile without a token left."""
    count = tl.cdiv(vocab, TILE)
    row = tl.program_id(0) // count
    tile = tl.program_id(0) % count
    token = tile * TILE + tl.arange(0, TILE)
    place, inside = locate(out, out_stride, row, token, vocab, ALIGNED)

    row_strength = per_row(strength, strengths, per_strength, row)
    peaks, _, steering = steer_row(
        workspace, row, vocab, row_strength, log_alpha, penalty, LANES, TILE
    )
    if is_active(only(tl.arange(0, LANES), tile, peaks), steering, REMOVE):
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
