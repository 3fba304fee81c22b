"""The second pass of `score` and `project_strength`: a few numbers per row."""

import triton
import triton.language as tl

from .triton_blocks import flat, list_blocks, list_tiles, tokens_of
from .triton_measure import (
    EXTRA,
    WARP,
    add,
    is_active,
    relative,
    shape_of,
    statistic,
    steer_row,
    tiles_lse,
    words_of,
)
from .triton_rows import (
    INF,
    LOWEST,
    Rows,
    accumulate,
    delta_of,
    join_lse,
    kernel,
    load_target,
    load_tile,
    penalised,
    per_row,
    probability,
    steered,
    steered_tile,
    wait_for_first_pass,
)


@triton.jit
def off_support(workspace, row, vocab, steering, LANES: tl.constexpr, TILE: tl.constexpr):
    """Peak and sum_exp of the tiles without support, as `accumulate` has them, in each lane."""
    count = tl.cdiv(vocab, TILE)
    peak = tl.full((WARP,), LOWEST, tl.float32)
    sum_exp = tl.zeros((WARP,), tl.float32)
    for first in tl.static_range(0, LANES, 32):
        peaks = statistic(workspace, row, count, 0, first, -INF, LANES)
        rest = (is_active(peaks, steering, True) == 0) & (peaks > -INF)
        peak, sum_exp = join_lse(
            peak,
            sum_exp,
            tl.where(rest, peaks, LOWEST),
            tl.where(rest, statistic(workspace, row, count, 1, first, 0.0, LANES), 0.0),
        )
    return peak, sum_exp


@kernel
def score_rows(
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
    targets,
    out,
    REMOVE: tl.constexpr,
    CHOSEN: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row: the log-probability of its target.

    If CHOSEN, `choose_tiles` has summed the tiles. Else what may have support is read here: cells
    with REMOVE, tiles without it. A tile without support is not read: a finite penalty shifts all
    its logits by the same amount, so its share of the sum follows from its sum_exp. The parts are
    only added, never subtracted from a total, so no digits cancel.
    """
    wait_for_first_pass(PDL)
    row = tl.program_id(0)
    row_strength = per_row(strength, strengths, per_strength, row)
    rows = Rows(adapted, adapted_stride, base, base_stride, vocab)
    steering = steer_row(
        workspace, row, vocab, row_strength, log_alpha, penalty, difference, LANES, TILE
    )
    if CHOSEN:
        lse = tiles_lse(workspace, row, tl.cdiv(vocab, TILE), LANES)
    else:
        SHAPE: tl.constexpr = shape_of(CHUNK, TILE)
        if REMOVE:
            blocks = list_blocks(workspace, row, vocab, steering, SHAPE, LANES, TILE)
        else:
            blocks = list_tiles(workspace, row, vocab, steering, True, LANES, TILE)
        lse_peak = tl.full(SHAPE, LOWEST, tl.float32)
        lse_sum_exp = tl.zeros(SHAPE, tl.float32)
        for block in tl.range(0, blocks.number):
            token = tokens_of(blocks, block, vocab, SHAPE)
            logits = steered_tile(rows, steering, row, token, REMOVE, ALIGNED)
            lse_peak, lse_sum_exp = accumulate(lse_peak, lse_sum_exp, logits)
        peak, sum_exp = tl.reduce((flat(lse_peak, TILE), flat(lse_sum_exp, TILE)), 0, join_lse)
        if not REMOVE:
            rest = off_support(workspace, row, vocab, steering, LANES, TILE)
            rest_peak, rest_sum_exp = tl.reduce(rest, 0, join_lse)
            rest_peak = tl.where(rest_sum_exp > 0, penalised(rest_peak, steering), LOWEST)
            peak, sum_exp = join_lse(peak, sum_exp, rest_peak, rest_sum_exp)
        lse = peak + tl.log(sum_exp)
    z, b = load_target(rows, row, tl.load(targets + row))
    logprob = steered(z, b, steering, REMOVE) - lse
    tl.store(
        out + row, tl.where((z == z) & (steering.peak == steering.peak), logprob, float("nan"))
    )


@triton.jit
def unread(
    workspace, row, vocab, steering, blocks,
    CHUNK: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The probability of the tokens that are in no block of a list of cells."""
    WORDS: tl.constexpr = words_of(CHUNK, TILE)[0]
    count = tl.cdiv(vocab, TILE)
    sum_exp = tl.zeros((WARP,), tl.float32)
    for first in tl.static_range(0, LANES, 32):
        peaks = statistic(workspace, row, count, 0, first, -INF, LANES)
        unmarked = statistic(workspace, row, count, EXTRA, first, 0.0, LANES)
        for word in tl.static_range(1, WORDS):
            unmarked += statistic(workspace, row, count, EXTRA + word, first, 0.0, LANES)
        unmarked = tl.where(blocks.whole, 0.0, unmarked)
        rest = statistic(workspace, row, count, 1, first, 0.0, LANES)
        rest = tl.where(is_active(peaks, steering, True), unmarked, rest)
        sum_exp += relative(peaks, steering.peak) * rest
    return tl.reduce(sum_exp, 0, add) * steering.scale


@triton.jit
def join_moments(sum_p, mean, spread, squares, more_p, other_mean, other_spread, other_squares):
    """Sum of p, mean, spread and sum of squares of two parts together (Chan et al., 1979)."""
    total = sum_p + more_p
    share = tl.where(total > 0, more_p / total, 0.0)
    step = other_mean - mean
    return (
        total,
        mean + step * share,
        spread + other_spread + step * step * sum_p * share,
        squares + other_squares,
    )


@kernel
def project_rows(
    adapted,
    adapted_stride: tl.int64,
    base,
    base_stride: tl.int64,
    workspace,
    vocab: tl.int32,
    log_alpha: tl.float32,
    difference: tl.int32,
    targets,
    numerator,
    gauss_newton,
    newton,
    in_support,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row: the target's I delta minus its mean, the sum of squares, the variance.

    `join_moments` adds token by token in each lane, then the lanes, then the tokens that were not
    read, where I delta is 0. No difference of large sums is formed, so the variance of a
    near-certain row is right too.
    """
    wait_for_first_pass(PDL)
    row = tl.program_id(0)
    rows = Rows(adapted, adapted_stride, base, base_stride, vocab)
    steering = steer_row(workspace, row, vocab, 0.0, log_alpha, 0.0, difference, LANES, TILE)
    SHAPE: tl.constexpr = shape_of(CHUNK, TILE)
    blocks = list_blocks(workspace, row, vocab, steering, SHAPE, LANES, TILE)
    sum_p = tl.zeros(SHAPE, tl.float32)
    mean = tl.zeros(SHAPE, tl.float32)
    spread = tl.zeros(SHAPE, tl.float32)  # sum of p * (I delta - mean)^2; at last the variance
    squares = tl.zeros(SHAPE, tl.float32)
    for block in tl.range(0, blocks.number):
        z, b = load_tile(rows, row, tokens_of(blocks, block, vocab, SHAPE), ALIGNED)
        delta = tl.where(z >= steering.threshold, delta_of(z, b, steering), 0.0)
        sum_p, mean, spread, squares = join_moments(
            sum_p, mean, spread, squares, probability(z, steering), delta, 0.0, delta * delta
        )
    sum_p, mean, spread, squares = tl.reduce(
        (flat(sum_p, TILE), flat(mean, TILE), flat(spread, TILE), flat(squares, TILE)),
        0, join_moments,
    )  # fmt: skip
    rest = unread(workspace, row, vocab, steering, blocks, CHUNK, LANES, TILE)
    _, mean, spread, squares = join_moments(sum_p, mean, spread, squares, rest, 0.0, 0.0, 0.0)

    z, b = load_target(rows, row, tl.load(targets + row))
    delta = delta_of(z, b, steering)
    kept = z >= steering.threshold
    valid = (z == z) & (steering.peak == steering.peak)
    tl.store(numerator + row, tl.where(valid, tl.where(kept, delta, 0.0) - mean, float("nan")))
    tl.store(gauss_newton + row, tl.where(valid, squares, float("nan")))
    tl.store(newton + row, tl.where(valid, spread, float("nan")))
    tl.store(in_support + row, kept & valid)
