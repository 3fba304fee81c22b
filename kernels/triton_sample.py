"""The second pass of `sample`, in one kernel per row or in two over tiles."""

import triton
import triton.language as tl

from .triton_measure import (
    EXTRA,
    STATISTICS,
    combine,
    is_active,
    next_tile,
    statistic,
    steer_row,
    tiles_lse,
)
from .triton_noise import gumbel_noise, random_bits
from .triton_rows import INF, NAN, Rows, accumulate, kernel, only, per_row, steered_tile


@triton.jit
def choose(
    rows,
    steering,
    row,
    token,
    temperature,
    seed,
    position,
    REMOVE: tl.constexpr,
    GREEDY: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The steered logits and the merits of a tile's tokens; `sample` returns the greatest merit."""
    logits = steered_tile(rows, steering, row, token, REMOVE, ALIGNED)
    merit = logits
    if not GREEDY:
        noise = gumbel_noise(random_bits(seed, token, position))
        # Relative to the peak, so that large logits do not round the noise away. A temperature
        # below 1 multiplies the noise instead, so that the quotient does not overflow.
        away = logits - steering.peak
        merit = away / tl.maximum(temperature, 1.0) + noise * tl.minimum(temperature, 1.0)
    return logits, merit


@triton.jit
def best_of(token, logits, merit, tile_begin):
    """The greatest merit of a tile, its token (of equals the lowest id) and its steered logit."""
    best, index = tl.max(merit, 0, return_indices=True)
    best_token = tile_begin + index
    return best, best_token, tl.sum(tl.where(token == best_token, logits, 0.0))


@kernel
def sample_rows(
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
    temperature: tl.float32,
    seed: tl.int64,
    seeds,
    per_seed: tl.int32,
    position: tl.int64,
    positions,
    per_position: tl.int32,
    token_out,
    logprob_out,
    GREEDY: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row: the best token and its log-probability, from the tiles with support."""
    row = tl.program_id(0)
    row_strength = per_row(strength, strengths, per_strength, row)
    row_seed = per_row(seed, seeds, per_seed, row)
    row_position = per_row(position, positions, per_position, row)
    rows = Rows(adapted, adapted_stride, base, base_stride, vocab)
    peaks, _, steering = steer_row(
        workspace, row, vocab, row_strength, log_alpha, penalty, LANES, TILE
    )
    active = is_active(peaks, steering, True)

    # An invalid row has no active tile: these initial values are then its result, -1 and NaN.
    best = -INF  # the greatest merit so far
    best_token = -1
    best_logit = -INF
    lse_peak = -INF
    lse_sum_exp = 0.0
    tile = next_tile(active, -1, LANES)
    while tile < LANES:
        token = tile * TILE + tl.arange(0, TILE)
        logits, merit = choose(
            rows, steering, row, token, temperature, row_seed, row_position, True, GREEDY, ALIGNED
        )
        tile_merit, tile_token, tile_logit = best_of(token, logits, merit, tile * TILE)
        if tile_merit > best:  # strictly: of equals the lowest token id wins
            best = tile_merit
            best_token = tile_token
            best_logit = tile_logit
        lse_peak, lse_sum_exp = accumulate(lse_peak, lse_sum_exp, logits, 1.0)
        tile = next_tile(active, tile, LANES)

    tl.store(token_out + row, best_token)
    tl.store(logprob_out + row, best_logit - lse_peak - tl.log(lse_sum_exp))


@kernel
def choose_tiles(
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
    temperature: tl.float32,
    seed: tl.int64,
    seeds,
    per_seed: tl.int32,
    position: tl.int64,
    positions,
    per_position: tl.int32,
    REMOVE: tl.constexpr,
    GREEDY: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per tile: its part of `sample_rows`, for rows in which any tile may have tokens.

    The 5 extra numbers in the workspace are merit, token and steered logit of the tile's best token
    and the peak and sum_exp of its steered logits. `settle_rows` combines them.
    """
    count = tl.cdiv(vocab, TILE)
    row = tl.program_id(0) // count
    tile = tl.program_id(0) % count
    row_strength = per_row(strength, strengths, per_strength, row)
    row_seed = per_row(seed, seeds, per_seed, row)
    row_position = per_row(position, positions, per_position, row)
    rows = Rows(adapted, adapted_stride, base, base_stride, vocab)
    peaks, _, steering = steer_row(
        workspace, row, vocab, row_strength, log_alpha, penalty, LANES, TILE
    )
    best = -INF
    best_token = -1
    best_logit = -INF
    lse_peak = -INF
    lse_sum_exp = 0.0
    if is_active(only(tl.arange(0, LANES), tile, peaks), steering, REMOVE):
        token = tile * TILE + tl.arange(0, TILE)
        logits, merit = choose(
            rows, steering, row, token, temperature, row_seed, row_position, REMOVE, GREEDY, ALIGNED
        )
        best, best_token, best_logit = best_of(token, logits, merit, tile * TILE)
        lse_peak, lse_sum_exp = accumulate(lse_peak, lse_sum_exp, logits, 1.0)
    place = workspace + tl.cast(row, tl.int64) * (STATISTICS * count) + EXTRA * count + tile
    tl.store(place, best)
    tl.store(place + count, tl.cast(best_token, tl.float32, bitcast=True))
    tl.store(place + 2 * count, best_logit)
    tl.store(place + 3 * count, lse_peak)
    tl.store(place + 4 * count, lse_sum_exp)


@kernel
def settle_rows(
    workspace,
    vocab: tl.int32,
    token_out,
    logprob_out,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row: the best token among those that `choose_tiles` chose."""
    row = tl.program_id(0)
    count = tl.cdiv(vocab, TILE)
    lane = tl.arange(0, LANES)
    _, _, peak, _, _ = combine(workspace, row, vocab, LANES, TILE)
    merits = statistic(workspace, row, count, EXTRA, -INF, LANES)
    tokens = statistic(workspace, row, count, EXTRA + 1, 0.0, LANES).to(tl.int32, bitcast=True)
    logits = statistic(workspace, row, count, EXTRA + 2, 0.0, LANES)
    best, tile = tl.max(merits, 0, return_indices=True)  # of equals the lowest tile
    found = (peak == peak) & (best > -INF)
    tl.store(token_out + row, tl.where(found, only(lane, tile, tokens), -1))
    logit = tl.where(found, only(lane, tile, logits), NAN)
    tl.store(logprob_out + row, logit - tiles_lse(workspace, row, count, LANES))
