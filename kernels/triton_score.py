"""The last passes of `score`, `project_strength` and `divergence`: a few numbers a row."""

import triton.language as tl

from .triton_measure import (
    EXTRA,
    combine,
    has_tokens,
    next_tile,
    statistic,
    steer_row,
    tiles_lse,
)
from .triton_rows import (
    INF,
    NAN,
    Rows,
    direction,
    grow,
    kernel,
    load_target,
    load_tile,
    penalised,
    per_row,
    probability,
    steered,
    steered_tile,
)


@kernel
def score_rows(
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
    targets,
    out,
    REMOVE: tl.constexpr,
    CHOSEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One row: the log-probability of its target; if CHOSEN `choose_tiles` has read the tiles.

    A tile without support is not read: a finite penalty moves all of it alike, so its mass follows
    from the sum of e. Nothing is subtracted from a whole: no digits cancel.
    """
    row = tl.program_id(0)
    mu = per_row(strength, strengths, per_strength, row)
    at = Rows(adapted, adapted_stride, base, base_stride, vocab)
    tops, sums, by = steer_row(workspace, row, vocab, mu, log_alpha, penalty, LANES, TILE)
    if CHOSEN:
        lse = tiles_lse(workspace, row, tl.cdiv(vocab, TILE), LANES)
    else:
        peak = -INF
        mass = 0.0
        live = has_tokens(tops, by, True)
        if not REMOVE:
            others = tl.where(live, -INF, tops)
            top = tl.max(others)
            peak = tl.where(top > -INF, penalised(top, by), -INF)
            mass = tl.sum(tl.where(others > -INF, tl.exp(others - top) * sums, 0.0))
        tile = next_tile(live, -1, LANES)
        while tile < LANES:
            token = tile * TILE + tl.arange(0, TILE)
            z_hat = steered_tile(at, by, row, token, REMOVE, ALIGNED)
            peak, mass = grow(peak, mass, z_hat, 1.0)
            tile = next_tile(live, tile, LANES)
        lse = peak + tl.log(mass)
    z, b = load_target(at, row, tl.load(targets + row))
    logprob = steered(z, b, by, REMOVE) - lse
    tl.store(out + row, tl.where((z == z) & (by.top == by.top), logprob, NAN))


@kernel
def project_rows(
    adapted,
    adapted_stride: tl.int64,
    base,
    base_stride: tl.int64,
    workspace,
    vocab: tl.int32,
    log_alpha: tl.float32,
    targets,
    numerator,
    gauss_newton,
    newton,
    in_support,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One row: the target's I delta less its mean, the sum of its squares, and its variance.

    Mean and variance of every tile join those of the tiles before (Chan et al. 1979); the rest of
    the row, where I delta is 0, starts them. So the variance of a near-certain row is right too.
    """
    row = tl.program_id(0)
    at = Rows(adapted, adapted_stride, base, base_stride, vocab)
    tops, sums, by = steer_row(workspace, row, vocab, 0.0, log_alpha, 0.0, LANES, TILE)
    live = has_tokens(tops, by, True)
    others = tl.where(live, -INF, tops)
    weight = tl.sum(tl.where(others > -INF, tl.exp(others - by.top) * sums, 0.0)) / by.total
    mean = 0.0
    variance = 0.0
    squares = 0.0
    tile = next_tile(live, -1, LANES)
    while tile < LANES:
        z, b = load_tile(at, row, tile * TILE + tl.arange(0, TILE), ALIGNED)
        p = probability(z, by)
        delta = tl.where(z >= by.threshold, direction(z, b, by), 0.0)
        mass = tl.sum(p)
        share = tl.where(mass > 0, mass / (weight + mass), 0.0)
        centre = tl.where(mass > 0, tl.sum(p * delta) / mass, 0.0)
        step = centre - mean
        from_centre = delta - centre
        variance += tl.sum(p * from_centre * from_centre) + step * step * weight * share
        mean += step * share
        weight += mass
        squares += tl.sum(delta * delta)
        tile = next_tile(live, tile, LANES)

    z, b = load_target(at, row, tl.load(targets + row))
    delta = direction(z, b, by)
    kept = z >= by.threshold
    valid = (z == z) & (by.top == by.top)
    tl.store(numerator + row, tl.where(valid, tl.where(kept, delta, 0.0) - mean, NAN))
    tl.store(gauss_newton + row, tl.where(valid, squares, NAN))
    tl.store(newton + row, tl.where(valid, variance, NAN))
    tl.store(in_support + row, kept & valid)


@kernel
def divergence_rows(
    workspace,
    vocab: tl.int32,
    out,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One row: E_p[d] - lse(z) + lse(b), all relative to the two maxima."""
    row = tl.program_id(0)
    count = tl.cdiv(vocab, TILE)
    tops, sums, top, total, _ = combine(workspace, row, vocab, LANES, TILE)
    weighted = statistic(workspace, row, count, 3, 0.0, LANES)
    base_tops = statistic(workspace, row, count, EXTRA, -INF, LANES)
    base_sums = statistic(workspace, row, count, EXTRA + 1, 0.0, LANES)
    base_top = tl.max(base_tops)
    base_scale = tl.where(base_tops > -INF, tl.exp(base_tops - base_top), 0.0)
    # d of a tile is relative to the tile's own maxima.
    d = weighted + sums * ((tops - top) - (base_tops - base_top))
    mean = tl.sum(tl.where(tops > -INF, tl.exp(tops - top) * d, 0.0)) / total
    result = mean - tl.log(total) + tl.log(tl.sum(base_scale * base_sums))
    result = tl.where(base_top < INF, result, INF)
    tl.store(out + row, tl.where(top == top, result, NAN))
