"""The pass of `topk`."""

import triton.language as tl

from .triton_measure import has_tokens, steer_row
from .triton_rows import INF, NAN, Rows, grow, kernel, only, per_row, steered_tile


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
    """One row's k best, in order: as a tournament of tiles.

    Every tile sends its best token. The best of those is next, and its tile, read again, sends
    what comes after it. When nothing above -inf is left, the other tokens follow in order.
    """
    row = tl.program_id(0)
    lane = tl.arange(0, LANES)
    mu = per_row(strength, strengths, per_strength, row)
    at = Rows(adapted, adapted_stride, base, base_stride, vocab)
    tops, _, by = steer_row(workspace, row, vocab, mu, log_alpha, penalty, LANES, TILE)
    logprob_out += row.to(tl.int64) * k
    token_out += row.to(tl.int64) * k

    # Of each tile the steered logit of its best, +inf before it is read, and the token, then -1.
    sent = tl.where(has_tokens(tops, by, REMOVE), INF, -INF)
    senders = tl.where(lane >= 0, -1, 0)
    done = 0
    last = INF  # the last picked, and its token
    last_token = -1
    peak = -INF
    mass = 0.0
    best, tile = tl.max(sent, 0, return_indices=True)  # ties go to the lowest tile
    while (done < k) & (best > -INF):
        sender = only(lane, tile, senders)
        if sender >= 0:
            last = best
            last_token = sender
            tl.store(logprob_out + done, best - peak - tl.log(mass))
            tl.store(token_out + done, sender)
            done += 1
        token = tile * TILE + tl.arange(0, TILE)
        z_hat = steered_tile(at, by, row, token, REMOVE, ALIGNED)
        if sender < 0:
            peak, mass = grow(peak, mass, z_hat, 1.0)
        after = (z_hat < last) | ((z_hat == last) & (token > last_token))
        rest, index = tl.max(tl.where(after, z_hat, -INF), 0, return_indices=True)
        sent = tl.where(lane == tile, rest, sent)
        senders = tl.where(lane == tile, tile * TILE + index, senders)
        best, tile = tl.max(sent, 0, return_indices=True)

    valid = by.top == by.top
    tile = 0
    while (done < k) & (tile * TILE < vocab):
        token = tile * TILE + tl.arange(0, TILE)
        z_hat = steered_tile(at, by, row, token, REMOVE, ALIGNED)
        picked = tl.where(valid, z_hat, -INF) > -INF
        left = (token < vocab) & (picked == 0)
        place = done + tl.cumsum(left.to(tl.int32), 0) - 1
        fits = left & (place < k)
        tl.store(logprob_out + place, tl.where(valid, -INF, NAN) + token * 0.0, fits)
        tl.store(token_out + place, tl.where(valid, token, -1), fits)
        done += tl.sum(left.to(tl.int32))
        tile += 1
