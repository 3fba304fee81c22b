"""The second pass of `score`, `project_strength` and `divergence`: a few numbers per row."""

import triton.language as tl

from .triton_measure import (
    EXTRA,
    combine,
    is_active,
    next_tile,
    statistic,
    steer_row,
    tiles_lse,
)
from .triton_rows import (
    INF,
    Rows,
    accumulate,
    delta_of,
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
    """One program per row: the log-probability of its target.

    If CHOSEN, `choose_tiles` has summed the tiles. Else the tiles with support are read here. A
    tile without support is not read: a finite penalty shifts all its logits by the same amount, so
    its share of the sum follows from its sum_exp. The parts are only added, never subtracted from a
    total, so no digits cancel.
    """
    row = tl.program_id(0)
    row_strength = per_row(strength, strengths, per_strength, row)
    rows = Rows(adapted, adapted_stride, base, base_stride, vocab)
    peaks, sum_exps, steering = steer_row(
        workspace, row, vocab, row_strength, log_alpha, penalty, LANES, TILE
    )
    if CHOSEN:
        lse = tiles_lse(workspace, row, tl.cdiv(vocab, TILE), LANES)
    else:
        lse_peak = -INF
        lse_sum_exp = 0.0
        has_support = is_active(peaks, steering, True)
        if not REMOVE:
            off_support = tl.where(has_support, -INF, peaks)
            peak = tl.max(off_support)
            lse_peak = tl.where(peak > -INF, penalised(peak, steering), -INF)
            lse_sum_exp = tl.sum(
                tl.where(off_support > -INF, tl.exp(off_support - peak) * sum_exps, 0.0)
            )
        tile = next_tile(has_support, -1, LANES)
        while tile < LANES:
            token = tile * TILE + tl.arange(0, TILE)
            logits = steered_tile(rows, steering, row, token, REMOVE, ALIGNED)
            lse_peak, lse_sum_exp = accumulate(lse_peak, lse_sum_exp, logits, 1.0)
            tile = next_tile(has_support, tile, LANES)
        lse = lse_peak + tl.log(lse_sum_exp)
    z, b = load_target(rows, row, tl.load(targets + row))
    logprob = steered(z, b, steering, REMOVE) - lse
    tl.store(
        out + row, tl.where((z == z) & (steering.peak == steering.peak), logprob, float("nan"))
    )


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
    """One program per row: the target's I delta minus its mean, the sum of squares, the variance.

    Mean and spread of each tile are joined to those of the tiles before it by the update of Chan et
    al. (1979), starting from the tiles without support, where I delta is 0. No difference of large
    sums is formed, so the variance of a near-certain row is right too.
    """
    row = tl.program_id(0)
    rows = Rows(adapted, adapted_stride, base, base_stride, vocab)
    peaks, sum_exps, steering = steer_row(workspace, row, vocab, 0.0, log_alpha, 0.0, LANES, TILE)
    has_support = is_active(peaks, steering, True)
    off_support = tl.where(has_support, -INF, peaks)
    sum_p = (
        tl.sum(tl.where(off_support > -INF, tl.exp(off_support - steering.peak) * sum_exps, 0.0))
        / steering.sum_exp
    )
    mean = 0.0
    spread = 0.0  # sum of p * (I delta - mean)^2; the variance once all of the row is in it
    squares = 0.0
    tile = next_tile(has_support, -1, LANES)
    while tile < LANES:
        z, b = load_tile(rows, row, tile * TILE + tl.arange(0, TILE), ALIGNED)
        p = probability(z, steering)
        delta = tl.where(z >= steering.threshold, delta_of(z, b, steering), 0.0)
        tile_sum_p = tl.sum(p)
        share = tl.where(tile_sum_p > 0, tile_sum_p / (sum_p + tile_sum_p), 0.0)
        tile_mean = tl.where(tile_sum_p > 0, tl.sum(p * delta) / tile_sum_p, 0.0)
        step = tile_mean - mean
        away = delta - tile_mean
        spread += tl.sum(p * away * away) + step * step * sum_p * share
        mean += step * share
        sum_p += tile_sum_p
        squares += tl.sum(delta * delta)
        tile = next_tile(has_support, tile, LANES)

    z, b = load_target(rows, row, tl.load(targets + row))
    delta = delta_of(z, b, steering)
    kept = z >= steering.threshold
    valid = (z == z) & (steering.peak == steering.peak)
    tl.store(numerator + row, tl.where(valid, tl.where(kept, delta, 0.0) - mean, float("nan")))
    tl.store(gauss_newton + row, tl.where(valid, squares, float("nan")))
    tl.store(newton + row, tl.where(valid, spread, float("nan")))
    tl.store(in_support + row, kept & valid)


@kernel
def divergence_rows(
    workspace,
    vocab: tl.int32,
    out,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row: E_p[d] - lse(z) + lse(b), each relative to the two peaks of the row."""
    row = tl.program_id(0)
    count = tl.cdiv(vocab, TILE)
    peaks, sum_exps, peak, sum_exp, _ = combine(workspace, row, vocab, LANES, TILE)
    tile_sum_exp_d = statistic(workspace, row, count, 3, 0.0, LANES)
    base_peaks = statistic(workspace, row, count, EXTRA, -INF, LANES)
    base_sum_exps = statistic(workspace, row, count, EXTRA + 1, 0.0, LANES)
    base_peak = tl.max(base_peaks)
    base_scale = tl.where(base_peaks > -INF, tl.exp(base_peaks - base_peak), 0.0)
    # The first pass took d relative to the peaks of the tile.
    sum_exp_d = tile_sum_exp_d + sum_exps * ((peaks - peak) - (base_peaks - base_peak))
    mean_d = tl.sum(tl.where(peaks > -INF, tl.exp(peaks - peak) * sum_exp_d, 0.0)) / sum_exp
    result = mean_d - tl.log(sum_exp) + tl.log(tl.sum(base_scale * base_sum_exps))
    result = tl.where(base_peak < INF, result, INF)
    tl.store(out + row, tl.where(peak == peak, result, float("nan")))
