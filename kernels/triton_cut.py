"""The second pass of `sample` with cuts: draw from the tokens that top_k, top_p and min_p keep.

The first walk goes over all blocks and keeps the first one; every later one goes over those whose
greatest steered logit reaches a bound.
"""

import triton
import triton.language as tl

from .triton_blocks import flat, list_blocks, list_tiles, rank, shape_in_order, tokens_of
from .triton_measure import EXTRA, WARP, add_2, numbers, steer_row
from .triton_rows import INF, LOWEST, Rows, exp, kernel, per_row, steered_tile, wait_for_first_pass
from .triton_sample import better_and_add, choose, keep_better


@triton.jit
def reaching_blocks(blocks, each, first, bound, STRICTLY: tl.constexpr, LANES: tl.constexpr):
    """Which blocks of the list reach `bound`, and the greatest logit of the others.

    The blocks are the 128 from `first` on, each a bit of two 64-bit words.
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
def next_block(low, high):
    """The number of the lowest bit of `reaching_blocks`, and the words without it."""
    from_low = low != 0
    word = tl.where(from_low, low, high)
    rest = word & (word - 1)
    bit = (word ^ rest).to(tl.float32)  # a power of two: its exponent is the number
    number = (bit.to(tl.int32, bitcast=True) >> 23) - 127
    block = tl.where(from_low, number, number + 64)
    return block, tl.where(from_low, rest, low), tl.where(from_low, high, rest)


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
def steered_block(
    rows, steering, row, blocks, block,
    REMOVE: tl.constexpr, ALIGNED: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """The steered logits of a block's tokens, in order."""
    token = tokens_of(blocks, block, rows.vocab, SHAPE)
    return steered_tile(rows, steering, row, token, REMOVE, ALIGNED)


@triton.jit
def survey(
    rows, steering, row, blocks, each, temperature,
    REMOVE: tl.constexpr, ALIGNED: tl.constexpr, SHAPE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of the steered logits: the greatest, the least above -inf, log sum exp,
    tempered_sum_exp = sum exp((logit - greatest) / temperature), and those of the first block.

    The greatest of each block is left at `each`.
    """
    held = tl.full(SHAPE, -INF, tl.float32)
    greatest = tl.full(SHAPE, LOWEST, tl.float32)
    least = tl.full(SHAPE, INF, tl.float32)
    sum_exp = tl.zeros(SHAPE, tl.float32)
    tempered = tl.zeros(SHAPE, tl.float32)
    for block in tl.range(0, blocks.number):
        logits = steered_block(rows, steering, row, blocks, block, REMOVE, ALIGNED, SHAPE)
        held = tl.where(block == 0, logits, held)
        tl.store(each + block, tl.max(flat(logits, TILE)))
        least = tl.minimum(least, tl.where(logits > -INF, logits, INF))
        away = logits - greatest
        e = exp(-tl.abs(away))
        tempered_e = exp(-tl.abs(away) / temperature)
        more = away > 0
        sum_exp = tl.where(more, sum_exp * e + 1.0, sum_exp + e)
        tempered = tl.where(more, tempered * tempered_e + 1.0, tempered + tempered_e)
        greatest = tl.maximum(greatest, logits)
    best, least = tl.reduce((flat(greatest, TILE), flat(least, TILE)), 0, greatest_and_least)
    away = greatest - best
    sum_exp, tempered = sum_exp * exp(away), tempered * exp(away / temperature)
    sum_exp, tempered = tl.reduce((flat(sum_exp, TILE), flat(tempered, TILE)), 0, add_2)
    tl.debug_barrier()
    return best, least, best + tl.log(sum_exp), tempered, held


@triton.jit
def cut_off(
    rows, steering, row, blocks, each, held, low, best, temperature, top_k, limit,
    REMOVE: tl.constexpr, ALIGNED: tl.constexpr,
    SHAPE: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The least steered logit that is kept, and count and tempered sum_exp of those above it.

    A token is kept if fewer than top_k tokens come before it, with a tempered sum_exp below limit.
    There is no sort: the cut is found by bisection over the logits of [low, best]. Each step reads
    the blocks that reach above the middle, counts the tokens there, and moves one end to a logit
    that occurs in the row: `high` to the greatest up to the middle, `low` to the least above it. So
    it ends at a logit of the row, after at most as many steps as there are halvings between the
    ends in float32, and after few where few distinct logits lie between them. `held`, the logits of
    the first block, are not read again.
    """
    more = tl.where(blocks.number > 1, LANES, 0)
    held_exp = exp((held - best) / temperature)
    high = best
    before = 0
    before_sum_exp = 0.0
    while low < high:
        middle = 0.5 * low + 0.5 * high
        middle = tl.where(middle < high, middle, low)
        above = held > middle
        count = above.to(tl.int32)
        sum_exp = tl.where(above, held_exp, 0.0)
        under = tl.where(above, -INF, held)  # the greatest up to the middle
        over = tl.where(above, held, INF)  # the least above it
        below = -INF
        for first in tl.range(0, more, 128):
            left, right, unread = reaching_blocks(blocks, each, first, middle, True, LANES)
            below = tl.maximum(below, unread)
            left = tl.where(first == 0, left >> 1 << 1, left)
            while (left | right) != 0:
                block, left, right = next_block(left, right)
                logits = steered_block(
                    rows, steering, row, blocks, first + block, REMOVE, ALIGNED, SHAPE
                )
                above = logits > middle
                under = tl.maximum(under, tl.where(above, -INF, logits))
                over = tl.minimum(over, tl.where(above, logits, INF))
                count += above.to(tl.int32)
                sum_exp += tl.where(above, exp((logits - best) / temperature), 0.0)
        counted, summed, reached, least = tl.reduce(
            (flat(count, TILE), flat(sum_exp, TILE), flat(under, TILE), flat(over, TILE)),
            0, count_above,
        )  # fmt: skip
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
    REMOVE: tl.constexpr, ALIGNED: tl.constexpr,
    SHAPE: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The best token of those above the cut and at it, its steered logit, and how many are at it.

    If RANKED: of those at the cut only the first ones, as far as top_k and limit go.
    """
    best = tl.full(SHAPE, -INF, tl.float32)
    best_token = tl.full(SHAPE, -1, tl.int32)
    best_logit = tl.full(SHAPE, -INF, tl.float32)
    at_cut = tl.zeros(SHAPE, tl.int32)
    for first in tl.range(0, LANES, 128):
        low, high, _ = reaching_blocks(blocks, each, first, cut, False, LANES)
        while (low | high) != 0:
            block, low, high = next_block(low, high)
            token = tokens_of(blocks, first + block, rows.vocab, SHAPE)
            logits, merit = choose(
                rows, steering, row, token, temperature, seed, position, REMOVE, False, ALIGNED
            )
            equal = logits == cut
            stays = logits >= cut
            if RANKED:
                place = rank(equal)
                fits = (before + place < top_k) & (before_sum_exp + place * exp_at_cut < limit)
                stays = (logits > cut) | (equal & fits)
                here = tl.sum(flat(equal, TILE).to(tl.int32))
                before += here
                before_sum_exp += here * exp_at_cut
            else:
                at_cut += equal.to(tl.int32)
            best, best_token, best_logit = keep_better(
                best, best_token, best_logit, tl.where(stays, merit, -INF), token, logits
            )
    _, token, logit, equals = tl.reduce(
        (flat(best, TILE), flat(best_token, TILE), flat(best_logit, TILE), flat(at_cut, TILE)),
        0, better_and_add,
    )  # fmt: skip
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
    CHUNK: tl.constexpr,
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

    SHAPE: tl.constexpr = shape_in_order(CHUNK, TILE)
    if REMOVE:
        blocks = list_blocks(workspace, row, vocab, steering, SHAPE, LANES, TILE)
    else:
        blocks = list_tiles(workspace, row, vocab, steering, REMOVE, LANES, TILE)
    count = tl.cdiv(vocab, TILE)
    each = numbers(workspace, row, count) + EXTRA * count
    greatest, least, lse, tempered_sum_exp, held = survey(
        rows, steering, row, blocks, each, temperature, REMOVE, ALIGNED, SHAPE, TILE
    )
    low = tl.maximum(least, greatest + log_min_p * temperature)
    limit = tl.maximum(top_p * tempered_sum_exp, 1e-30)  # top_p = 0 keeps the greatest too
    cut, before, before_sum_exp = cut_off(
        rows, steering, row, blocks, each, held, low, greatest, temperature, top_k, limit,
        REMOVE, ALIGNED, SHAPE, LANES, TILE,
    )  # fmt: skip
    exp_at_cut = exp((cut - greatest) / temperature)  # of each token whose logit is `cut`

    token, logit, equals = choose_kept(
        rows, steering, row, blocks, each, temperature, row_seed, row_position,
        cut, before, before_sum_exp, exp_at_cut, top_k, limit, False,
        REMOVE, ALIGNED, SHAPE, LANES, TILE,
    )  # fmt: skip
    last = equals - 1
    if (before + last >= top_k) | (before_sum_exp + last * exp_at_cut >= limit):
        token, logit, _ = choose_kept(
            rows, steering, row, blocks, each, temperature, row_seed, row_position,
            cut, before, before_sum_exp, exp_at_cut, top_k, limit, True,
            REMOVE, ALIGNED, SHAPE, LANES, TILE,
        )  # fmt: skip
    tl.store(token_out + row, token)
    tl.store(logprob_out + row, logit - lse)
