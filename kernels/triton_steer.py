"""The pass of `steer` that writes."""

import triton.language as tl

from .triton_rows import (
    INF,
    NAN,
    STATISTICS,
    combine,
    kernel,
    load_tile,
    locate,
    per_row,
    steered,
    tile_threshold,
)


@kernel
def steer_tiles(
    adapted,
    adapted_stride: tl.int64,
    base,
    base_stride: tl.int64,
    workspace,
    strength: tl.float32,
    strengths,
    log_alpha: tl.float32,
    penalty: tl.float32,
    out,
    out_stride: tl.int64,
    vocab: tl.int32,
    REMOVE: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of steered logits. A tile without support is filled, not read, if REMOVE."""
    count = tl.cdiv(vocab, TILE)
    row = tl.program_id(0) // count
    tile = tl.program_id(0) % count
    token = tile * TILE + tl.arange(0, TILE)
    place, inside = locate(out, out_stride, row, token, vocab, ALIGNED)

    _, top, total, mean = combine(workspace, row, count, LANES)
    threshold = top + log_alpha
    tile_top = tl.load(workspace + row.to(tl.int64) * (STATISTICS * count) + tile)
    if tile_top >= tile_threshold(top, threshold, REMOVE):
        z, b = load_tile(adapted, adapted_stride, base, base_stride, row, token, vocab, ALIGNED)
        mu = per_row(strength, strengths, row)
        z_hat = steered(z, b, top, total, mean, mu, threshold, penalty, REMOVE)
        tl.store(place, z_hat.to(out.dtype.element_ty), inside)
    else:
        fill = tl.zeros((TILE,), tl.float32) + tl.where(top == top, -INF, NAN)
        tl.store(place, fill.to(out.dtype.element_ty), inside)
