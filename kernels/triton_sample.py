"""The second pass of `sample`, in one kernel per row or in two over tiles."""

import triton
import triton.language as tl

from .triton_blocks import flat, list_blocks, tokens_of
from .triton_measure import (
    EXTRA,
    combine,
    is_active,
    numbers,
    row_and_tile,
    shape_of,
    statistic,
    steer_row,
    steer_row_of_tile,
    tiles_lse,
)
from .triton_noise import gumbel_noise, random_bits
from .triton_rows import (
    INF,
    LOWEST,
    Rows,
    accumulate,
    comes_first,
    exp,
    join_lse,
    kernel,
    per_row,
    steered_tile,
    wait_for_first_pass,
)


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
        noise = gumbel_noise(random_bits(seed, token, position, token.shape[-1]))
        # Relative to the peak, so that large logits do not round the noise away. A temperature
        # below 1 multiplies the noise instead, so that the quotient does not overflow.
        away = logits - steering.peak
        merit = away / tl.maximum(temperature, 1.0) + noise * tl.minimum(temperature, 1.0)
    return logits, merit


@triton.jit
def better(merit, token, logit, other_merit, other_token, other_logit):
    """Of two tokens the one that is chosen, with its merit before and its steered logit after."""
    first = comes_first(merit, token, other_merit, other_token)
    return (
        tl.where(first, merit, other_merit),
        tl.where(first, token, other_token),
        tl.where(first, logit, other_logit),
    )


@triton.jit
def better_and_add(a, b, c, total, other_a, other_b, other_c, other_total):
    a, b, c = better(a, b, c, other_a, other_b, other_c)
    return a, b, c, total + other_total


@triton.jit
def better_and_join(a, b, c, peak, sum_exp, other_a, other_b, other_c, other_peak, other_sum_exp):
    a, b, c = better(a, b, c, other_a, other_b, other_c)
    peak, sum_exp = join_lse(peak, sum_exp, other_peak, other_sum_exp)
    return a, b, c, peak, sum_exp


@triton.jit
def keep_better(best, best_token, best_logit, merit, token, logits):
    """`better`, lane by lane, where the other tokens have the higher ids."""
    more = merit > best
    return (
        tl.where(more, merit, best),
        tl.where(more, token, best_token),
        tl.where(more, logits, best_logit),
    )


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
    difference: tl.int32,
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
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row: the best token and its log-probability, from cells with support."""
    wait_for_first_pass(PDL)
    row = tl.program_id(0)
    row_strength = per_row(strength, strengths, per_strength, row)
    row_seed = per_row(seed, seeds, per_seed, row)
    row_position = per_row(position, positions, per_position, row)
    rows = Rows(adapted, adapted_stride, base, base_stride, vocab)
    steering = steer_row(
        workspace, row, vocab, row_strength, log_alpha, penalty, difference, LANES, TILE
    )

    SHAPE: tl.constexpr = shape_of(CHUNK, TILE)
    blocks = list_blocks(workspace, row, vocab, steering, SHAPE, LANES, TILE)
    # An invalid row has no active tile: these initial values are then its result, -1 and NaN.
    best = tl.full(SHAPE, -INF, tl.float32)  # the greatest merit so far, in each lane
    best_token = tl.full(SHAPE, -1, tl.int32)
    best_logit = tl.full(SHAPE, -INF, tl.float32)
    lse_peak = tl.full(SHAPE, LOWEST, tl.float32)
    lse_sum_exp = tl.zeros(SHAPE, tl.float32)
    for block in tl.range(0, blocks.number):
        token = tokens_of(blocks, block, vocab, SHAPE)
        logits, merit = choose(
            rows, steering, row, token, temperature, row_seed, row_position, True, GREEDY, ALIGNED
        )
        best, best_token, best_logit = keep_better(
            best, best_token, best_logit, merit, token, logits
        )
        lse_peak, lse_sum_exp = accumulate(lse_peak, lse_sum_exp, logits)
    _, token, logit, peak, sum_exp = tl.reduce(
        (
            flat(best, TILE), flat(best_token, TILE), flat(best_logit, TILE),
            flat(lse_peak, TILE), flat(lse_sum_exp, TILE),
        ),
        0, better_and_join,
    )  # fmt: skip
    tl.store(token_out + row, token)
    tl.store(logprob_out + row, logit - peak - tl.log(sum_exp))


@kernel
def choose_tiles(
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
    temperature: tl.float32,
    seed: tl.int64,
    seeds,
    per_seed: tl.int32,
    position: tl.int64,
    positions,
    per_position: tl.int32,
    reciprocal: tl.uint32,
    shift: tl.uint32,
    REMOVE: tl.constexpr,
    GREEDY: tl.constexpr,
    PDL: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per tile: its part of `sample_rows`, for rows in which any tile may have tokens.

    The 5 extra numbers in the workspace are merit, token and steered logit of the tile's best token
    and the peak and sum_exp of its steered logits. `settle_rows` combines them.
    """
    wait_for_first_pass(PDL)
    count = tl.cdiv(vocab, TILE)
    row, tile = row_and_tile(count, reciprocal, shift)
    row_strength = per_row(strength, strengths, per_strength, row)
    row_seed = per_row(seed, seeds, per_seed, row)
    row_position = per_row(position, positions, per_position, row)
    rows = Rows(adapted, adapted_stride, base, base_stride, vocab)
    steering = steer_row_of_tile(
        workspace, row, vocab, combined, row_strength, log_alpha, penalty, difference, LANES, TILE
    )
    place = numbers(workspace, row, count) + tile
    best = -INF
    best_token = -1
    best_logit = -INF
    peak = LOWEST
    sum_exp = 0.0
    if is_active(tl.load(place), steering, REMOVE):
        token = tile * TILE + tl.arange(0, TILE)
        logits, merit = choose(
            rows, steering, row, token, temperature, row_seed, row_position, REMOVE, GREEDY, ALIGNED
        )
        peak = tl.maximum(tl.max(logits), LOWEST)
        best, best_token, best_logit, sum_exp = tl.reduce(
            (merit, token, logits, exp(logits - peak)), 0, better_and_add
        )
    place += EXTRA * count
    tl.store(place, best)
    tl.store(place + count, tl.cast(best_token, tl.float32, bitcast=True))
    tl.store(place + 2 * count, best_logit)
    tl.store(place + 3 * count, peak)
    tl.store(place + 4 * count, sum_exp)


@kernel
def settle_rows(
    workspace,
    vocab: tl.int32,
    token_out,
    logprob_out,
    PDL: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row: the best token among those that `choose_tiles` chose."""
    wait_for_first_pass(PDL)
    row = tl.program_id(0)
    count = tl.cdiv(vocab, TILE)
    peak, _, _ = combine(workspace, row, vocab, LANES, TILE)
    merits = statistic(workspace, row, count, EXTRA, 0, -INF, LANES)
    tokens = statistic(workspace, row, count, EXTRA + 1, 0, 0.0, LANES).to(tl.int32, bitcast=True)
    logits = statistic(workspace, row, count, EXTRA + 2, 0, 0.0, LANES)
    for first in tl.static_range(32, LANES, 32):
        more = statistic(workspace, row, count, EXTRA + 1, first, 0.0, LANES)
        merits, tokens, logits = keep_better(
            merits, tokens, logits,
            statistic(workspace, row, count, EXTRA, first, -INF, LANES),
            more.to(tl.int32, bitcast=True),
            statistic(workspace, row, count, EXTRA + 2, first, 0.0, LANES),
        )  # fmt: skip
    best, token, logit = tl.reduce((merits, tokens, logits), 0, better)
    found = (peak == peak) & (best > -INF)
    tl.store(token_out + row, tl.where(found, token, -1))
    logit = tl.where(found, logit, float("nan"))
    tl.store(logprob_out + row, logit - tiles_lse(workspace, row, count, LANES))
