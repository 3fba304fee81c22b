"""The second pass of `topk`."""

import triton
import triton.language as tl

from .triton_blocks import flat, list_blocks, list_tiles, tokens_of, tokens_of_lane
from .triton_measure import WARP, shape_of, steer_row
from .triton_rows import (
    INF,
    LOWEST,
    Rows,
    accumulate,
    comes_first,
    join_lse,
    kernel,
    load_target,
    per_row,
    steered,
    steered_tile,
    wait_for_first_pass,
)


@triton.jit
def first_of(logit, token, other_logit, other_token):
    """The one of two tokens that comes first."""
    first = comes_first(logit, token, other_logit, other_token)
    return tl.where(first, logit, other_logit), tl.where(first, token, other_token)


@triton.jit
def next_in_lane(
    rows, steering, row, blocks, lane, last, last_token,
    REMOVE: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """The token of a lane that comes after its last result; of logit -inf if there is none."""
    best = tl.full((WARP,), -INF, tl.float32)
    best_token = tl.full((WARP,), -1, tl.int32)
    for first in tl.range(0, blocks.number, WARP):
        block = first + tl.arange(0, WARP)
        token = tokens_of_lane(blocks, block, lane, rows.vocab, SHAPE)
        z, b = load_target(rows, row, token)
        logits = steered(z, b, steering, REMOVE)
        after = comes_first(last, last_token, logits, token) & (logits > best)
        best = tl.where(after, logits, best)
        best_token = tl.where(after, token, best_token)
    return tl.reduce((best, best_token), 0, first_of)


@kernel
def topk_rows(
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
    k: tl.int32,
    logprob_out,
    token_out,
    REMOVE: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row: its k best tokens in order, by a tournament of lanes.

    A lane has one token of each block. Every lane enters its best token. The best entry of all is
    the next result, and its lane is read again, if there is more than one block, to enter the token
    that comes after it: so the blocks are read once, then a lane for each result, and nothing is
    sorted. When no entry above -inf is left, the slots that are left get the tokens of logit -inf
    in order.
    """
    wait_for_first_pass(PDL)
    row = tl.program_id(0)
    row_strength = per_row(strength, strengths, per_strength, row)
    rows = Rows(adapted, adapted_stride, base, base_stride, vocab)
    steering = steer_row(
        workspace, row, vocab, row_strength, log_alpha, penalty, difference, LANES, TILE
    )
    logprob_out += row.to(tl.int64) * k
    token_out += row.to(tl.int64) * k

    SHAPE: tl.constexpr = shape_of(CHUNK, TILE)
    if REMOVE:
        blocks = list_blocks(workspace, row, vocab, steering, SHAPE, LANES, TILE)
    else:
        blocks = list_tiles(workspace, row, vocab, steering, REMOVE, LANES, TILE)
    entries = tl.full(SHAPE, -INF, tl.float32)
    tokens = tl.full(SHAPE, -1, tl.int32)
    lse_peak = tl.full(SHAPE, LOWEST, tl.float32)
    lse_sum_exp = tl.zeros(SHAPE, tl.float32)
    for block in tl.range(0, blocks.number):
        token = tokens_of(blocks, block, vocab, SHAPE)
        logits = steered_tile(rows, steering, row, token, REMOVE, ALIGNED)
        more = logits > entries
        entries = tl.where(more, logits, entries)
        tokens = tl.where(more, token, tokens)
        lse_peak, lse_sum_exp = accumulate(lse_peak, lse_sum_exp, logits)
    entries, tokens = flat(entries, TILE), flat(tokens, TILE)
    peak, sum_exp = tl.reduce((flat(lse_peak, TILE), flat(lse_sum_exp, TILE)), 0, join_lse)
    lse = peak + tl.log(sum_exp)

    done = 0
    best, best_token = tl.reduce((entries, tokens), 0, first_of)
    while (done < k) & (best > -INF):
        tl.store(logprob_out + done, best - lse)
        tl.store(token_out + done, best_token)
        done += 1
        won = tokens == best_token
        entry, token = tl.cast(-INF, tl.float32), tl.cast(-1, tl.int32)
        if blocks.number > 1:
            lane = tl.max(tl.where(won, tl.arange(0, TILE), 0))
            entry, token = next_in_lane(
                rows, steering, row, blocks, lane, best, best_token, REMOVE, SHAPE
            )
        entries = tl.where(won, entry, entries)
        tokens = tl.where(won, token, tokens)
        best, best_token = tl.reduce((entries, tokens), 0, first_of)

    valid = steering.peak == steering.peak
    tile = 0
    while (done < k) & (tile * TILE < vocab):
        token = tile * TILE + tl.arange(0, TILE)
        logits = steered_tile(rows, steering, row, token, REMOVE, ALIGNED)
        is_result = tl.where(valid, logits, -INF) > -INF
        left = (token < vocab) & (is_result == 0)
        place = done + tl.cumsum(left.to(tl.int32), 0) - 1
        fits = left & (place < k)
        tl.store(logprob_out + place, tl.where(valid, -INF, float("nan")) + token * 0.0, fits)
        tl.store(token_out + place, tl.where(valid, token, -1), fits)
        done += tl.sum(left.to(tl.int32))
        tile += 1
