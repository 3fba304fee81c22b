"""The second pass of `sample` with cuts: draw from the tokens that top_k, top_p and min_p keep."""

import triton
import triton.language as tl

from .triton_measure import is_active, next_tile, steer_row
from .triton_rows import INF, Rows, accumulate, kernel, per_row, steered_tile
from .triton_sample import best_of, choose


@triton.jit
def survey(
    rows, steering, row, active, temperature,
    REMOVE: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of the steered logits: each tile's greatest, the row's least above -inf, log sum exp, and
    tempered_sum_exp = sum exp((logit - greatest) / temperature)."""
    lane = tl.arange(0, LANES)
    tile_best = tl.where(lane >= 0, -INF, 0.0)
    least = INF
    lse_peak = -INF
    lse_sum_exp = 0.0
    tempered_peak = -INF
    tempered_sum_exp = 0.0
    tile = next_tile(active, -1, LANES)
    while tile < LANES:
        token = tile * TILE + tl.arange(0, TILE)
        logits = steered_tile(rows, steering, row, token, REMOVE, ALIGNED)
        tile_best = tl.where(lane == tile, tl.max(logits), tile_best)
        least = tl.minimum(least, tl.min(tl.where(logits > -INF, logits, INF)))
        lse_peak, lse_sum_exp = accumulate(lse_peak, lse_sum_exp, logits, 1.0)
        tempered_peak, tempered_sum_exp = accumulate(
            tempered_peak, tempered_sum_exp, logits, temperature
        )
        tile = next_tile(active, tile, LANES)
    return tile_best, least, lse_peak + tl.log(lse_sum_exp), tempered_sum_exp


@triton.jit
def cut_off(
    rows, steering, row, tile_best, low, temperature, top_k, limit,
    REMOVE: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The least steered logit that is kept, and count and tempered sum_exp of those above it.

    A token is kept if fewer than top_k tokens come before it, with a tempered sum_exp below limit.
    There is no sort: the cut is found by bisection over the logits of [low, greatest]. Each step
    reads the tiles that reach above the middle, counts the tokens there, and moves one end to a
    logit that occurs in the row: `high` to the greatest up to the middle, `low` to the least above
    it. So it ends at a logit of the row, after at most as many steps as there are halvings between
    the ends in float32, and after few where few distinct logits lie between them.
    """
    high = tl.max(tile_best)
    best = high
    before = 0
    before_sum_exp = 0.0
    while low < high:
        middle = 0.5 * low + 0.5 * high
        middle = tl.where(middle < high, middle, low)
        under = tl.max(tl.where(tile_best > middle, -INF, tile_best))  # the greatest up to middle
        over = best  # the least above it
        count = 0
        sum_exp = 0.0
        reach = tile_best > middle
        tile = next_tile(reach, -1, LANES)
        while tile < LANES:
            token = tile * TILE + tl.arange(0, TILE)
            logits = steered_tile(rows, steering, row, token, REMOVE, ALIGNED)
            above = logits > middle
            under = tl.maximum(under, tl.max(tl.where(above, -INF, logits)))
            over = tl.minimum(over, tl.min(tl.where(above, logits, INF)))
            count += tl.sum(above.to(tl.int32))
            sum_exp += tl.sum(tl.where(above, tl.exp((logits - best) / temperature), 0.0))
            tile = next_tile(reach, tile, LANES)
        if (count < top_k) & (sum_exp < limit) & (under >= low):
            high = under
            before = count
            before_sum_exp = sum_exp
        else:
            low = over
    return high, before, before_sum_exp


@kernel
def cut_rows(
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
    top_k: tl.int32,
    top_p: tl.float32,
    log_min_p: tl.float32,
    token_out,
    logprob_out,
    REMOVE: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row: `sample_rows` of the kept tokens; of equal logits low ids stay."""
    row = tl.program_id(0)
    row_strength = per_row(strength, strengths, per_strength, row)
    row_seed = per_row(seed, seeds, per_seed, row)
    row_position = per_row(position, positions, per_position, row)
    rows = Rows(adapted, adapted_stride, base, base_stride, vocab)
    peaks, _, steering = steer_row(
        workspace, row, vocab, row_strength, log_alpha, penalty, LANES, TILE
    )
    active = is_active(peaks, steering, REMOVE)

    tile_best, least, lse, tempered_sum_exp = survey(
        rows, steering, row, active, temperature, REMOVE, ALIGNED, LANES, TILE
    )
    greatest = tl.max(tile_best)
    low = tl.maximum(least, greatest + log_min_p * temperature)
    limit = tl.maximum(top_p * tempered_sum_exp, 1e-30)  # top_p = 0 keeps the greatest too
    cut, before, before_sum_exp = cut_off(
        rows, steering, row, tile_best, low, temperature, top_k, limit,
        REMOVE, ALIGNED, LANES, TILE,
    )  # fmt: skip
    exp_at_cut = tl.exp((cut - greatest) / temperature)  # of each token whose logit is `cut`

    best = -INF
    best_token = -1
    best_logit = -INF
    kept = active & (tile_best >= cut)
    tile = next_tile(kept, -1, LANES)
    while tile < LANES:
        token = tile * TILE + tl.arange(0, TILE)
        logits, merit = choose(
            rows, steering, row, token, temperature, row_seed, row_position, REMOVE, False, ALIGNED
        )
        equal = logits == cut
        rank = tl.cumsum(equal.to(tl.int32), 0) - 1
        fits = (before + rank < top_k) & (before_sum_exp + rank * exp_at_cut < limit)
        stays = (logits > cut) | (equal & fits)
        tile_merit, tile_token, tile_logit = best_of(
            token, logits, tl.where(stays, merit, -INF), tile * TILE
        )
        if tile_merit > best:
            best = tile_merit
            best_token = tile_token
            best_logit = tile_logit
        before += tl.sum(equal.to(tl.int32))
        before_sum_exp += tl.sum(tl.where(equal, exp_at_cut, 0.0))
        tile = next_tile(kept, tile, LANES)

    tl.store(token_out + row, best_token)
    tl.store(logprob_out + row, best_logit - lse)
