"""The second pass of `divergence` and `support`, which need the sums of the base's row too."""

from typing import NamedTuple

import triton
import triton.language as tl

from .triton_blocks import flat, list_blocks, rank, shape_in_order, tokens_of
from .triton_measure import EXTRA, WARP, add_3, combine, relative, statistic
from .triton_rows import (
    INF,
    Rows,
    RowSteering,
    delta_of,
    kernel,
    load_target,
    load_tile,
    probability,
    wait_for_first_pass,
)


class Pair(NamedTuple):
    """The sums of both rows."""

    peak: tl.tensor  # NaN if a row is invalid
    sum_exp: tl.tensor
    mean_d: tl.tensor
    base_peak: tl.tensor
    base_sum_exp: tl.tensor
    divergence: tl.tensor


@triton.jit
def combine_pair(workspace, row, vocab, LANES: tl.constexpr, TILE: tl.constexpr):
    """Combine what `measure_tiles` wrote with BASE: all sums are relative to the two peaks."""
    count = tl.cdiv(vocab, TILE)
    peak, sum_exp, _ = combine(workspace, row, vocab, LANES, TILE)
    greatest = statistic(workspace, row, count, EXTRA, 0, -INF, LANES)
    only_adapted = statistic(workspace, row, count, EXTRA + 2, 0, 0.0, LANES)
    for first in tl.static_range(32, LANES, 32):
        greatest = tl.maximum(greatest, statistic(workspace, row, count, EXTRA, first, -INF, LANES))
        more = statistic(workspace, row, count, EXTRA + 2, first, 0.0, LANES)
        only_adapted = tl.maximum(only_adapted, more)
    base_peak = tl.max(greatest)
    sum_exp_in_base = tl.zeros((WARP,), tl.float32)
    sum_exp_d = tl.zeros((WARP,), tl.float32)
    base_sum_exp = tl.zeros((WARP,), tl.float32)
    for first in tl.static_range(0, LANES, 32):
        peaks = statistic(workspace, row, count, 0, first, -INF, LANES)
        base_peaks = statistic(workspace, row, count, EXTRA, first, -INF, LANES)
        in_base = statistic(workspace, row, count, 2, first, 0.0, LANES)
        # The first pass took d relative to the peaks of the tile.
        moved = in_base * ((peaks - peak) - (base_peaks - base_peak))
        moved = tl.where((peaks > -INF) & (base_peaks > -INF), moved, 0.0)
        scale = relative(peaks, peak)
        sum_exp_in_base += scale * in_base
        sum_exp_d += scale * (statistic(workspace, row, count, 3, first, 0.0, LANES) + moved)
        base_sum_exp += relative(base_peaks, base_peak) * statistic(
            workspace, row, count, EXTRA + 1, first, 0.0, LANES
        )
    sum_exp_in_base, sum_exp_d, base_sum_exp = tl.reduce(
        (sum_exp_in_base, sum_exp_d, base_sum_exp), 0, add_3
    )
    between = peak - base_peak
    mean_d = tl.where(sum_exp_in_base > 0, sum_exp_d / sum_exp_in_base + between, 0.0)
    divergence = sum_exp_d / sum_exp - tl.log(sum_exp) + tl.log(base_sum_exp)
    divergence = tl.where(tl.max(only_adapted) > 0, INF, divergence)
    divergence = tl.where(peak == peak, divergence, float("nan"))
    return Pair(peak, sum_exp, mean_d, base_peak, base_sum_exp, divergence)


@kernel
def divergence_rows(
    workspace,
    vocab: tl.int32,
    out,
    PDL: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row: E_p[d] - lse(z) + lse(b), each relative to the two peaks of the row."""
    wait_for_first_pass(PDL)
    row = tl.program_id(0)
    tl.store(out + row, combine_pair(workspace, row, vocab, LANES, TILE).divergence)


@kernel
def support_rows(
    adapted,
    adapted_stride: tl.int64,
    base,
    base_stride: tl.int64,
    workspace,
    vocab: tl.int32,
    log_alpha: tl.float32,
    difference: tl.int32,
    targets,
    capacity: tl.int32,
    token_out,
    p_out,
    delta_out,
    logp_out,
    logq_out,
    mean_d_out,
    divergence_out,
    size_out,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row: its support in order, as far as the slots go, and its sums."""
    wait_for_first_pass(PDL)
    row = tl.program_id(0)
    rows = Rows(adapted, adapted_stride, base, base_stride, vocab)
    pair = combine_pair(workspace, row, vocab, LANES, TILE)
    steering = RowSteering(
        pair.peak, 1.0 / pair.sum_exp, pair.mean_d, pair.peak + log_alpha, 0.0, 0.0, difference
    )
    slots = row.to(tl.int64) * capacity
    size = 0
    SHAPE: tl.constexpr = shape_in_order(CHUNK, TILE)
    blocks = list_blocks(workspace, row, vocab, steering, SHAPE, LANES, TILE)
    for block in tl.range(0, blocks.number):
        token = tokens_of(blocks, block, vocab, SHAPE)
        z, b = load_tile(rows, row, token, ALIGNED)
        kept = (z >= steering.threshold) & (z > -INF)
        slot = size + rank(kept)
        listed = kept & (slot < capacity)
        tl.store(token_out + slots + slot, token.to(tl.int64), listed)
        tl.store(p_out + slots + slot, probability(z, steering), listed)
        tl.store(delta_out + slots + slot, delta_of(z, b, steering), listed)
        size += tl.sum(flat(kept, TILE).to(tl.int32))

    valid = pair.peak == pair.peak
    for first in tl.range(0, capacity, TILE):
        slot = first + tl.arange(0, TILE)
        empty = (slot >= size) & (slot < capacity)
        nothing = tl.full((TILE,), 0.0, tl.float32) + tl.where(valid, 0.0, float("nan"))
        tl.store(token_out + slots + slot, tl.full((TILE,), -1, tl.int64), empty)
        tl.store(p_out + slots + slot, nothing, empty)
        tl.store(delta_out + slots + slot, nothing, empty)

    z, b = load_target(rows, row, tl.load(targets + row))
    scored = valid & (z == z)
    logp = z - pair.peak - tl.log(pair.sum_exp)
    logq = tl.where(b > -INF, b - pair.base_peak - tl.log(pair.base_sum_exp), -INF)
    tl.store(logp_out + row, tl.where(scored, logp, float("nan")))
    tl.store(logq_out + row, tl.where(scored, logq, float("nan")))
    tl.store(mean_d_out + row, tl.where(valid, pair.mean_d, float("nan")))
    tl.store(divergence_out + row, pair.divergence)
    tl.store(size_out + row, size)
