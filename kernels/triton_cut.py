"""The second pass of `sample` with cuts: draw from the tokens that top_k, top_p and min_p keep.

The first walk goes over all active tiles, every later one over those whose greatest steered logit
reaches a bound.
"""

import triton
import triton.language as tl

from .triton_blocks import list_tiles, tokens_of_tile
from .triton_measure import EXTRA, WARP, add_2, numbers, steer_row
from .triton_rows import INF, LOWEST, Rows, exp, kernel, per_row, steered_tile, wait_for_first_pass
from .triton_sample import better_and_add, choose, keep_better


@triton.jit
def reaching_tiles(blocks, each, first, bound, STRICTLY: tl.constexpr, LANES: tl.constexpr):
    """Which tiles of the list reach `bound`, and the greatest logit of the others.

    The tiles are the 128 from `first` on, each a bit of two 64-bit words.
    """
    lane = tl.arange(0, WARP)
    low = tl.cast(0, tl.uint64)
    high = tl.cast(0, tl.uint64)
    below = tl.full((WARP,), -INF, tl.float32)
    for group in tl.static_range(0, LANES if LANES < 128 else 128, 32):
        block = first + group + lane
        inside = block < blocks.number
        best = tl.load(each + block, inside, other=-INF)
        if STRICTLY:
            reaches = best > bound
        else:
            reaches = best >= bound
        below = tl.maximum(below, tl.where(reaches, -INF, best))
        bits = tl.sum(tl.where(inside & reaches, 1 << lane, 0).to(tl.uint32)).to(tl.uint64)
        if group < 64:
            low |= bits << group
        else:
            high |= bits << (group - 64)
    return low, high, tl.max(below)


@triton.jit
def next_tile(low, high):
    """The number of the lowest bit of `reaching_tiles`, and the words without it."""
    from_low = low != 0
    word = tl.where(from_low, low, high)
    rest = word & (word - 1)
    bit = (word ^ rest).to(tl.float32)  # a power of two: its exponent is the number
    number = (bit.to(tl.int32, bitcast=True) >> 23) - 127
    tile = tl.where(from_low, number, number + 64)
    return tile, tl.where(from_low, rest, low), tl.where(from_low, high, rest)


@triton.jit
def greatest_and_least(greatest, least, other_greatest, other_least):
    return tl.maximum(greatest, other_greatest), tl.minimum(least, other_least)


@triton.jit
def count_above(count, sum_exp, under, over, other_count, other_sum_exp, other_under, other_over):
    return (
        count + other_count,
        sum_exp + other_sum_exp,
        tl.maximum(under, other_under),
        tl.minimum(over, other_over),
    )


@triton.jit
def survey(
    rows, steering, row, blocks, each, temperature,
    REMOVE: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of the steered logits: the greatest, the least above -inf, log sum exp, and
    tempered_sum_exp = sum exp((logit - greatest) / temperature).

    The greatest of each tile is left at `each`.
    """
    greatest = tl.full((TILE,), LOWEST, tl.float32)
    least = tl.full((TILE,), INF, tl.float32)
    sum_exp = tl.zeros((TILE,), tl.float32)
    tempered = tl.zeros((TILE,), tl.float32)
    for block in tl.range(0, blocks.number):
        token = tokens_of_tile(blocks, block, TILE)
        logits = steered_tile(rows, steering, row, token, REMOVE, ALIGNED)
        tl.store(each + block, tl.max(logits))
        least = tl.minimum(least, tl.where(logits > -INF, logits, INF))
        away = logits - greatest
        e = exp(-tl.abs(away))
        tempered_e = exp(-tl.abs(away) / temperature)
        more = away > 0
        sum_exp = tl.where(more, sum_exp * e + 1.0, sum_exp + e)
        tempered = tl.where(more, tempered * tempered_e + 1.0, tempered + tempered_e)
        greatest = tl.maximum(greatest, logits)
    best, least = tl.reduce((greatest, least), 0, greatest_and_least)
    away = greatest - best
    sum_exp, tempered = tl.reduce(
        (sum_exp * exp(away), tempered * exp(away / temperature)), 0, add_2
    )
    tl.debug_barrier()
    return best, least, best + tl.log(sum_exp), tempered


@triton.jit
def cut_off(
    rows, steering, row, blocks, each, low, best, temperature, top_k, limit,
    REMOVE: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The least steered logit that is kept, and count and tempered sum_exp of those above it.

    A token is kept if fewer than top_k tokens come before it, with a tempered sum_exp below limit.
    There is no sort: the cut is found by bisection over the logits of [low, best]. Each step reads
    the tiles that reach above the middle, counts the tokens there, and moves one end to a logit
    that occurs in the row: `high` to the greatest up to the middle, `low` to the least above it. So
    it ends at a logit of the row, after at most as many steps as there are halvings between the
    ends in float32, and after few where few distinct logits lie between them.
    """
    high = best
    before = 0
    before_sum_exp = 0.0
    while low < high:
        middle = 0.5 * low + 0.5 * high
        middle = tl.where(middle < high, middle, low)
        count = tl.zeros((TILE,), tl.int32)
        sum_exp = tl.zeros((TILE,), tl.float32)
        under = tl.full((TILE,), -INF, tl.float32)  # the greatest up to the middle
        over = tl.full((TILE,), INF, tl.float32)  # the least above it
        below = -INF
        for first in tl.range(0, LANES, 128):
            left, right, unread = reaching_tiles(blocks, each, first, middle, True, LANES)
            below = tl.maximum(below, unread)
            while (left | right) != 0:
                tile, left, right = next_tile(left, right)
                token = tokens_of_tile(blocks, first + tile, TILE)
                logits = steered_tile(rows, steering, row, token, REMOVE, ALIGNED)
                above = logits > middle
                under = tl.maximum(under, tl.where(above, -INF, logits))
                over = tl.minimum(over, tl.where(above, logits, INF))
                count += above.to(tl.int32)
                sum_exp += tl.where(above, exp((logits - best) / temperature), 0.0)
        counted, summed, reached, least = tl.reduce((count, sum_exp, under, over), 0, count_above)
        reached = tl.maximum(reached, below)
        if (counted < top_k) & (summed < limit) & (reached >= low):
            high = reached
            before = counted
            before_sum_exp = summed
        else:
            low = tl.minimum(least, best)
    return high, before, before_sum_exp


@triton.jit
def choose_kept(
    rows, steering, row, blocks, each, temperature, seed, position,
    cut, before, before_sum_exp, exp_at_cut, top_k, limit, RANKED: tl.constexpr,
    REMOVE: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The best token of those above the cut and at it, its steered logit, and how many are at it.

    If RANKED: of those at the cut only the first ones, as far as top_k and limit go.
    """
    best = tl.full((TILE,), -INF, tl.float32)
    best_token = tl.full((TILE,), -1, tl.int32)
    best_logit = tl.full((TILE,), -INF, tl.float32)
    at_cut = tl.zeros((TILE,), tl.int32)
    for first in tl.range(0, LANES, 128):
        low, high, _ = reaching_tiles(blocks, each, first, cut, False, LANES)
        while (low | high) != 0:
            tile, low, high = next_tile(low, high)
            token = tokens_of_tile(blocks, first + tile, TILE)
            logits, merit = choose(
                rows, steering, row, token, temperature, seed, position, REMOVE, False, ALIGNED
            )
            equal = logits == cut
            stays = logits >= cut
            if RANKED:
                rank = tl.cumsum(equal.to(tl.int32), 0) - 1
                fits = (before + rank < top_k) & (before_sum_exp + rank * exp_at_cut < limit)
                stays = (logits > cut) | (equal & fits)
                here = tl.sum(equal.to(tl.int32))
                before += here
                before_sum_exp += here * exp_at_cut
            else:
                at_cut += equal.to(tl.int32)
            best, best_token, best_logit = keep_better(
                best, best_token, best_logit, tl.where(stays, merit, -INF), token, logits
            )
    _, token, logit, equals = tl.reduce((best, best_token, best_logit, at_cut), 0, better_and_add)
    return token, logit, equals


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
    difference: tl.int32,
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
    PDL: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row: `sample_rows` of the kept tokens; of equal logits low ids stay."""
    wait_for_first_pass(PDL)
    row = tl.program_id(0)
    row_strength = per_row(strength, strengths, per_strength, row)
    row_seed = per_row(seed, seeds, per_seed, row)
    row_position = per_row(position, positions, per_position, row)
    rows = Rows(adapted, adapted_stride, base, base_stride, vocab)
    steering = steer_row(
        workspace, row, vocab, row_strength, log_alpha, penalty, difference, LANES, TILE
    )

    blocks = list_tiles(workspace, row, vocab, steering, REMOVE, LANES, TILE)
    count = tl.cdiv(vocab, TILE)
    each = numbers(workspace, row, count) + EXTRA * count
    greatest, least, lse, tempered_sum_exp = survey(
        rows, steering, row, blocks, each, temperature, REMOVE, ALIGNED, TILE
    )
    low = tl.maximum(least, greatest + log_min_p * temperature)
    limit = tl.maximum(top_p * tempered_sum_exp, 1e-30)  # top_p = 0 keeps the greatest too
    cut, before, before_sum_exp = cut_off(
        rows, steering, row, blocks, each, low, greatest, temperature, top_k, limit,
        REMOVE, ALIGNED, LANES, TILE,
    )  # fmt: skip
    exp_at_cut = exp((cut - greatest) / temperature)  # of each token whose logit is `cut`

    token, logit, equals = choose_kept(
        rows, steering, row, blocks, each, temperature, row_seed, row_position,
        cut, before, before_sum_exp, exp_at_cut, top_k, limit, False,
        REMOVE, ALIGNED, LANES, TILE,
    )  # fmt: skip
    last = equals - 1
    if (before + last >= top_k) | (before_sum_exp + last * exp_at_cut >= limit):
        token, logit, _ = choose_kept(
            rows, steering, row, blocks, each, temperature, row_seed, row_position,
            cut, before, before_sum_exp, exp_at_cut, top_k, limit, True,
            REMOVE, ALIGNED, LANES, TILE,
        )  # fmt: skip
    tl.store(token_out + row, token)
    tl.store(logprob_out + row, logit - lse)
