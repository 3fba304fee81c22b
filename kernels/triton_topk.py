"""The second pass of `topk`."""

import triton
import triton.language as tl

from .triton_measure import (
    WARP,
    active_tiles,
    is_active,
    next_tile,
    statistic,
    steer_row,
)
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
def next_in_column(
    rows, steering, row, workspace, last, last_token,
    REMOVE: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The token of the last result's column that comes after it; of logit -inf if there is none."""
    count = tl.cdiv(rows.vocab, TILE)
    best = tl.full((WARP,), -INF, tl.float32)
    best_token = tl.full((WARP,), -1, tl.int32)
    for first in tl.static_range(0, LANES, 32):
        active = is_active(statistic(workspace, row, count, 0, first, -INF), steering, REMOVE)
        token = (first + tl.arange(0, WARP)) * TILE + last_token % TILE
        z, b = load_target(rows, row, tl.where(active, token, -1))
        logits = steered(z, b, steering, REMOVE)
        after = active & comes_first(last, last_token, logits, token) & (logits > best)
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
    PDL: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row: its k best tokens in order, by a tournament of columns.

    A column is what the tiles have at one place. Every column enters its best token. The best entry
    of all is the next result, and its column is read again to enter the token that comes after it:
    so the active tiles are read once, then a column for each result, and nothing is sorted. When no
    entry above -inf is left, the slots that are left get the tokens of logit -inf in order.
    """
    wait_for_first_pass(PDL)
    row = tl.program_id(0)
    column = tl.arange(0, TILE)
    row_strength = per_row(strength, strengths, per_strength, row)
    rows = Rows(adapted, adapted_stride, base, base_stride, vocab)
    steering = steer_row(
        workspace, row, vocab, row_strength, log_alpha, penalty, difference, LANES, TILE
    )
    logprob_out += row.to(tl.int64) * k
    token_out += row.to(tl.int64) * k

    entries = tl.full((TILE,), -INF, tl.float32)
    tokens = tl.full((TILE,), -1, tl.int32)
    lse_peak = tl.full((TILE,), LOWEST, tl.float32)
    lse_sum_exp = tl.zeros((TILE,), tl.float32)
    for first in tl.range(0, LANES, 128):
        low, high = active_tiles(workspace, row, vocab, steering, first, REMOVE, LANES, TILE)
        while (low | high) != 0:
            tile, low, high = next_tile(low, high)
            token = (first + tile) * TILE + column
            logits = steered_tile(rows, steering, row, token, REMOVE, ALIGNED)
            more = logits > entries
            entries = tl.where(more, logits, entries)
            tokens = tl.where(more, token, tokens)
            lse_peak, lse_sum_exp = accumulate(lse_peak, lse_sum_exp, logits)
    peak, sum_exp = tl.reduce((lse_peak, lse_sum_exp), 0, join_lse)
    lse = peak + tl.log(sum_exp)

    done = 0
    best, best_token = tl.reduce((entries, tokens), 0, first_of)
    while (done < k) & (best > -INF):
        tl.store(logprob_out + done, best - lse)
        tl.store(token_out + done, best_token)
        done += 1
        entry, token = next_in_column(
            rows, steering, row, workspace, best, best_token, REMOVE, LANES, TILE
        )
        entries = tl.where(column == best_token % TILE, entry, entries)
        tokens = tl.where(column == best_token % TILE, token, tokens)
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
