"""The passes of `sample` that pick the token."""

import triton
import triton.language as tl

from .triton_measure import (
    EXTRA,
    STATISTICS,
    combine,
    has_tokens,
    next_tile,
    statistic,
    steer_row,
    tiles_lse,
)
from .triton_noise import gumbel_noise, random_bits
from .triton_rows import INF, NAN, Rows, grow, kernel, only, per_row, steered_tile


@triton.jit
def choose(
    at,
    by,
    row,
    token,
    temperature,
    seed,
    position,
    REMOVE: tl.constexpr,
    GREEDY: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The steered logits of a tile's tokens, and how each fares: the greatest merit is chosen."""
    z_hat = steered_tile(at, by, row, token, REMOVE, ALIGNED)
    merit = z_hat
    if not GREEDY:
        noise = gumbel_noise(random_bits(seed, token, position))
        # Relative to top, so that large logits do not round the noise away.
        merit = (z_hat - by.top) / temperature + noise
    return z_hat, merit


@triton.jit
def best_of(token, z_hat, merit, first):
    """The greatest merit, ties to the lowest token id, its token, and the steered logit of that."""
    best, index = tl.max(merit, 0, return_indices=True)
    return best, first + index, tl.sum(tl.where(token == first + index, z_hat, 0.0))


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
    """One row: the best token and its log-probability, from the few tiles with support."""
    row = tl.program_id(0)
    mu = per_row(strength, strengths, per_strength, row)
    seed_here = per_row(seed, seeds, per_seed, row)
    position_here = per_row(position, positions, per_position, row)
    at = Rows(adapted, adapted_stride, base, base_stride, vocab)
    tops, _, by = steer_row(workspace, row, vocab, mu, log_alpha, penalty, LANES, TILE)
    live = has_tokens(tops, by, True)

    # An invalid row has no live tile, and what stands here then is its result.
    best = -INF  # the greatest merit, its token and the steered logit of that
    best_token = -1
    best_logit = -INF
    peak = -INF
    mass = 0.0
    tile = next_tile(live, -1, LANES)
    while tile < LANES:
        token = tile * TILE + tl.arange(0, TILE)
        z_hat, merit = choose(
            at, by, row, token, temperature, seed_here, position_here, True, GREEDY, ALIGNED
        )
        here, here_token, here_logit = best_of(token, z_hat, merit, tile * TILE)
        if here > best:  # strictly: ties go to the lowest token id
            best = here
            best_token = here_token
            best_logit = here_logit
        peak, mass = grow(peak, mass, z_hat, 1.0)
        tile = next_tile(live, tile, LANES)

    tl.store(token_out + row, best_token)
    tl.store(logprob_out + row, best_logit - peak - tl.log(mass))


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
    """One tile's part of `sample_rows`, where every tile has a part: `settle_rows` has the rest.

    The extras are the merit, the token and the steered logit of the tile's best, and the peak and
    the mass of its steered logits.
    """
    count = tl.cdiv(vocab, TILE)
    row = tl.program_id(0) // count
    tile = tl.program_id(0) % count
    mu = per_row(strength, strengths, per_strength, row)
    seed_here = per_row(seed, seeds, per_seed, row)
    position_here = per_row(position, positions, per_position, row)
    at = Rows(adapted, adapted_stride, base, base_stride, vocab)
    tops, _, by = steer_row(workspace, row, vocab, mu, log_alpha, penalty, LANES, TILE)
    best = -INF
    best_token = -1
    best_logit = -INF
    peak = -INF
    mass = 0.0
    if has_tokens(only(tl.arange(0, LANES), tile, tops), by, REMOVE):
        token = tile * TILE + tl.arange(0, TILE)
        z_hat, merit = choose(
            at, by, row, token, temperature, seed_here, position_here, REMOVE, GREEDY, ALIGNED
        )
        best, best_token, best_logit = best_of(token, z_hat, merit, tile * TILE)
        peak, mass = grow(peak, mass, z_hat, 1.0)
    place = workspace + tl.cast(row, tl.int64) * (STATISTICS * count) + EXTRA * count + tile
    tl.store(place, best)
    tl.store(place + count, tl.cast(best_token, tl.float32, bitcast=True))
    tl.store(place + 2 * count, best_logit)
    tl.store(place + 3 * count, peak)
    tl.store(place + 4 * count, mass)


@kernel
def settle_rows(
    workspace,
    vocab: tl.int32,
    token_out,
    logprob_out,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """The best of the tiles' choices."""
    row = tl.program_id(0)
    count = tl.cdiv(vocab, TILE)
    lane = tl.arange(0, LANES)
    _, _, top, _, _ = combine(workspace, row, vocab, LANES, TILE)
    merits = statistic(workspace, row, count, EXTRA, -INF, LANES)
    tokens = statistic(workspace, row, count, EXTRA + 1, 0.0, LANES).to(tl.int32, bitcast=True)
    logits = statistic(workspace, row, count, EXTRA + 2, 0.0, LANES)
    best, tile = tl.max(merits, 0, return_indices=True)  # ties go to the lowest tile
    found = (top == top) & (best > -INF)
    tl.store(token_out + row, tl.where(found, only(lane, tile, tokens), -1))
    logit = tl.where(found, only(lane, tile, logits), NAN)
    tl.store(logprob_out + row, logit - tiles_lse(workspace, row, count, LANES))
