"""The pass of `sample` that draws from what top_k, top_p and min_p leave of a row."""

import triton
import triton.language as tl

from .triton_measure import has_tokens, next_tile, steer_row
from .triton_rows import INF, Rows, grow, kernel, per_row, steered_tile
from .triton_sample import best_of, choose


@triton.jit
def survey(
    at, by, row, live, temperature,
    REMOVE: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of the steered logits: each tile's greatest; the least above -inf; log sum exp; and the mass
    sum exp((z_hat - greatest) / temperature)."""
    lane = tl.arange(0, LANES)
    peaks = tl.where(lane >= 0, -INF, 0.0)
    least = INF
    peak = -INF
    total = 0.0
    same_peak = -INF
    mass = 0.0
    tile = next_tile(live, -1, LANES)
    while tile < LANES:
        token = tile * TILE + tl.arange(0, TILE)
        z_hat = steered_tile(at, by, row, token, REMOVE, ALIGNED)
        peaks = tl.where(lane == tile, tl.max(z_hat), peaks)
        least = tl.minimum(least, tl.min(tl.where(z_hat > -INF, z_hat, INF)))
        peak, total = grow(peak, total, z_hat, 1.0)
        same_peak, mass = grow(same_peak, mass, z_hat, temperature)
        tile = next_tile(live, tile, LANES)
    return peaks, least, peak + tl.log(total), mass


@triton.jit
def cut_off(
    at, by, row, peaks, low, temperature, top_k, top_mass,
    REMOVE: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The least steered logit that is kept, and the count and the mass of those above it.

    A token is kept if fewer than top_k stand before it, with less than top_mass. Bisection over
    [low, greatest]: every step counts what is above the middle, in the tiles that reach so high,
    and moves one end to a logit that occurs. It ends after at most as many steps as the ends are
    halvings apart, and after a few where few logits occur.
    """
    high = tl.max(peaks)
    peak = high
    before = 0
    weight = 0.0
    while low < high:
        middle = 0.5 * low + 0.5 * high
        middle = tl.where(middle < high, middle, low)
        under = tl.max(tl.where(peaks > middle, -INF, peaks))  # the greatest up to the middle
        over = peak  # the least above it
        count = 0
        mass = 0.0
        reach = peaks > middle
        tile = next_tile(reach, -1, LANES)
        while tile < LANES:
            token = tile * TILE + tl.arange(0, TILE)
            z_hat = steered_tile(at, by, row, token, REMOVE, ALIGNED)
            above = z_hat > middle
            under = tl.maximum(under, tl.max(tl.where(above, -INF, z_hat)))
            over = tl.minimum(over, tl.min(tl.where(above, z_hat, INF)))
            count += tl.sum(above.to(tl.int32))
            mass += tl.sum(tl.where(above, tl.exp((z_hat - peak) / temperature), 0.0))
            tile = next_tile(reach, tile, LANES)
        if (count < top_k) & (mass < top_mass) & (under >= low):
            high = under
            before = count
            weight = mass
        else:
            low = over
    return high, before, weight


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
    """One row: `sample_rows` of the tokens that are kept; of equals the lowest ids are."""
    row = tl.program_id(0)
    mu = per_row(strength, strengths, per_strength, row)
    seed_here = per_row(seed, seeds, per_seed, row)
    position_here = per_row(position, positions, per_position, row)
    at = Rows(adapted, adapted_stride, base, base_stride, vocab)
    tops, _, by = steer_row(workspace, row, vocab, mu, log_alpha, penalty, LANES, TILE)
    live = has_tokens(tops, by, REMOVE)

    peaks, least, lse, mass = survey(
        at, by, row, live, temperature, REMOVE, ALIGNED, LANES, TILE
    )  # fmt: skip
    peak = tl.max(peaks)
    low = tl.maximum(least, peak + log_min_p * temperature)
    limit = tl.maximum(top_p * mass, 1e-30)  # the greatest stays at top_p = 0 too
    cut, before, weight = cut_off(
        at, by, row, peaks, low, temperature, top_k, limit, REMOVE, ALIGNED, LANES, TILE
    )
    each = tl.exp((cut - peak) / temperature)  # the mass of one token at the cut

    best = -INF
    best_token = -1
    best_logit = -INF
    kept = live & (peaks >= cut)
    tile = next_tile(kept, -1, LANES)
    while tile < LANES:
        token = tile * TILE + tl.arange(0, TILE)
        z_hat, merit = choose(
            at, by, row, token, temperature, seed_here, position_here, REMOVE, False, ALIGNED
        )
        equal = z_hat == cut
        rank = tl.cumsum(equal.to(tl.int32), 0) - 1
        first = (before + rank < top_k) & (weight + rank * each < limit)
        stays = (z_hat > cut) | (equal & first)
        here, here_token, here_logit = best_of(
            token, z_hat, tl.where(stays, merit, -INF), tile * TILE
        )
        if here > best:
            best = here
            best_token = here_token
            best_logit = here_logit
        before += tl.sum(equal.to(tl.int32))
        weight += tl.sum(tl.where(equal, each, 0.0))
        tile = next_tile(kept, tile, LANES)

    tl.store(token_out + row, best_token)
    tl.store(logprob_out + row, best_logit - lse)
