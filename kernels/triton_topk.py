"""The second pass of `topk`."""

import triton.language as tl

from .triton_measure import is_active, steer_row
from .triton_rows import INF, Rows, accumulate, kernel, only, per_row, steered_tile


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
    k: tl.int32,
    logprob_out,
    token_out,
    REMOVE: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row: its k best tokens in order, by a tournament of tiles.

    Every active tile enters its best token. The best entry of all is the next result, and its tile
    is read again to enter the token that comes after it: so k + (active tiles) tiles are read, and
    nothing is sorted. An entry is +inf before its tile has been read, so that every tile is read
    before the first result. When no entry above -inf is left, the remaining slots get the tokens of
    logit -inf in order of their ids.
    """
    row = tl.program_id(0)
    lane = tl.arange(0, LANES)
    row_strength = per_row(strength, strengths, per_strength, row)
    rows = Rows(adapted, adapted_stride, base, base_stride, vocab)
    peaks, _, steering = steer_row(
        workspace, row, vocab, row_strength, log_alpha, penalty, LANES, TILE
    )
    logprob_out += row.to(tl.int64) * k
    token_out += row.to(tl.int64) * k

    # The entry of each tile: a steered logit and its token, or +inf and -1 before it is read.
    entry_logits = tl.where(is_active(peaks, steering, REMOVE), INF, -INF)
    entry_tokens = tl.where(lane >= 0, -1, 0)
    done = 0
    last = INF  # the steered logit of the last result
    last_token = -1
    lse_peak = -INF
    lse_sum_exp = 0.0
    best, tile = tl.max(entry_logits, 0, return_indices=True)  # of equals the lowest tile
    while (done < k) & (best > -INF):
        best_token = only(lane, tile, entry_tokens)
        if best_token >= 0:
            last = best
            last_token = best_token
            tl.store(logprob_out + done, best - lse_peak - tl.log(lse_sum_exp))
            tl.store(token_out + done, best_token)
            done += 1
        token = tile * TILE + tl.arange(0, TILE)
        logits = steered_tile(rows, steering, row, token, REMOVE, ALIGNED)
        if best_token < 0:
            lse_peak, lse_sum_exp = accumulate(lse_peak, lse_sum_exp, logits, 1.0)
        after = (logits < last) | ((logits == last) & (token > last_token))
        entry, index = tl.max(tl.where(after, logits, -INF), 0, return_indices=True)
        entry_logits = tl.where(lane == tile, entry, entry_logits)
        entry_tokens = tl.where(lane == tile, tile * TILE + index, entry_tokens)
        best, tile = tl.max(entry_logits, 0, return_indices=True)

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
