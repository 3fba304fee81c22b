"""The pass of `steer` and `steering_vector` that writes."""

import triton.language as tl

from .triton_measure import has_tokens, steer_row
from .triton_rows import (
    INF,
    NAN,
    Rows,
    direction,
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
    """One tile of steered logits, or of delta. A tile without tokens left is filled, not read."""
    count = tl.cdiv(vocab, TILE)
    row = tl.program_id(0) // count
    tile = tl.program_id(0) % count
    token = tile * TILE + tl.arange(0, TILE)
    place, inside = locate(out, out_stride, row, token, vocab, ALIGNED)

    mu = per_row(strength, strengths, per_strength, row)
    tops, _, by = steer_row(workspace, row, vocab, mu, log_alpha, penalty, LANES, TILE)
    if has_tokens(only(tl.arange(0, LANES), tile, tops), by, REMOVE):
        at = Rows(adapted, adapted_stride, base, base_stride, vocab)
        z, b = load_tile(at, row, token, ALIGNED)
        if DELTA:
            values = direction(z, b, by)
        else:
            values = steered(z, b, by, REMOVE)
        tl.store(place, values.to(out.dtype.element_ty), inside)
    else:
        empty = 0.0 if DELTA else -INF
        fill = tl.zeros((TILE,), tl.float32) + tl.where(by.top == by.top, empty, NAN)
        tl.store(place, fill.to(out.dtype.element_ty), inside)
