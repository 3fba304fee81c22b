"""The first pass, which reads both rows once, and the row statistics that the second pass takes.

A row is cut into tiles. `measure_tiles` writes a few numbers per tile. Every program that needs the
statistics of the whole row recomputes them from those with `combine`: it reads a few hundred bytes,
needs no atomics and gets the same bits as every other program.
"""

import triton
import triton.language as tl

from .triton_rows import INF, NAN, Rows, RowSteering, difference, kernel, load_tile

# workspace[row, :, tile]: the 4 numbers of `measure_tiles`, then its 2 extra ones for `divergence`
# or the 5 of `choose_tiles`.
STATISTICS = tl.constexpr(9)
EXTRA = tl.constexpr(4)


@kernel
def measure_tiles(
    adapted,
    adapted_stride: tl.int64,
    base,
    base_stride: tl.int64,
    workspace,
    vocab: tl.int32,
    BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """workspace[row, :, tile] = peak, sum_exp, sum_exp_in_base, sum_exp_d of the tile.

    A NaN or +inf makes sum_exp NaN if it is an adapted logit, sum_exp_d if it is a base logit.

    If BASE: d is (z - peak) - (b - base_peak), so that a shift common to all logits is not rounded
    away, and 2 extra numbers follow: base_peak, or +inf if a token is possible in z and not in b,
    and base_sum_exp.
    """
    count = tl.cdiv(vocab, TILE)
    row = tl.program_id(0) // count
    tile = tl.program_id(0) % count
    token = tile * TILE + tl.arange(0, TILE)
    rows = Rows(adapted, adapted_stride, base, base_stride, vocab)
    z, b = load_tile(rows, row, token, ALIGNED)
    place = workspace + row.to(tl.int64) * (STATISTICS * count) + tile

    peak = tl.max(z)
    origin = tl.where(peak > -INF, peak, 0.0)  # so that e is 0, not NaN, if the whole tile is -inf
    e = tl.exp(z - origin)
    valid = b < INF
    in_base = b > -INF
    d = difference(z, b)
    if BASE:
        base_peak = tl.max(b)
        base_origin = tl.where(base_peak > -INF, base_peak, 0.0)
        d = difference(z - origin, b - base_origin)
        only_adapted = tl.max(((z > -INF) & (b == -INF)).to(tl.int32))
        tl.store(place + EXTRA * count, tl.where(only_adapted > 0, INF, base_peak))
        tl.store(place + (EXTRA + 1) * count, tl.sum(tl.exp(b - base_origin)))

    tl.store(place, peak)
    tl.store(place + count, tl.sum(e))
    tl.store(place + 2 * count, tl.sum(tl.where(in_base, e, 0.0)))
    tl.store(place + 3 * count, tl.sum(tl.where(valid, e * d, NAN)))


@triton.jit
def statistic(workspace, row, count, which, absent, LANES: tl.constexpr):
    """Load one number per tile of a row, one tile per lane; `absent` in lanes without a tile."""
    lane = tl.arange(0, LANES)
    place = workspace + (row.to(tl.int64) * STATISTICS + which) * count
    return tl.load(place + lane, lane < count, other=absent)


@triton.jit
def combine(workspace, row, vocab, LANES: tl.constexpr, TILE: tl.constexpr):
    """The peaks and sum_exps of the tiles; peak (NaN if invalid), sum_exp and mean_d of the row."""
    count = tl.cdiv(vocab, TILE)
    peaks = statistic(workspace, row, count, 0, -INF, LANES)
    sum_exps = statistic(workspace, row, count, 1, 0.0, LANES)
    peak = tl.max(peaks)
    scale = tl.where(peaks > -INF, tl.exp(peaks - peak), 0.0)
    sum_exp = tl.sum(scale * sum_exps)
    sum_exp_in_base = tl.sum(scale * statistic(workspace, row, count, 2, 0.0, LANES))
    sum_exp_d = tl.sum(scale * statistic(workspace, row, count, 3, 0.0, LANES))
    mean_d = tl.where(sum_exp_in_base > 0, sum_exp_d / sum_exp_in_base, 0.0)
    valid = (peak > -INF) & (sum_exp == sum_exp) & (sum_exp_d == sum_exp_d)
    return peaks, sum_exps, tl.where(valid, peak, NAN), sum_exp, mean_d


@triton.jit
def steer_row(
    workspace, row, vocab, strength, log_alpha, penalty, LANES: tl.constexpr, TILE: tl.constexpr
):
    """The peaks of the tiles, the sum_exps of the tiles, and the steering of the row."""
    peaks, sum_exps, peak, sum_exp, mean_d = combine(workspace, row, vocab, LANES, TILE)
    peak = tl.where(tl.abs(strength) < INF, peak, NAN)
    steering = RowSteering(peak, sum_exp, mean_d, peak + log_alpha, strength, penalty)
    return peaks, sum_exps, steering


@triton.jit
def is_active(peaks, steering, REMOVE: tl.constexpr):
    """Whether a tile with this peak has a token left; False for every tile of an invalid row.

    With REMOVE those are the tiles with a token in the support. Without it they are the tiles with
    any possible token; the comparison with peak - INF is False if the row's peak is NaN.
    """
    if REMOVE:
        return (peaks >= steering.threshold) & (peaks > -INF)
    else:
        return (peaks >= steering.peak - INF) & (peaks > -INF)


@triton.jit
def next_tile(active, after, LANES: tl.constexpr):
    """The first active tile after this one, or LANES: `while tile < LANES` walks them."""
    lane = tl.arange(0, LANES)
    return tl.min(tl.where(active & (lane > after), lane, LANES))


@triton.jit
def tiles_lse(workspace, row, count, LANES: tl.constexpr):
    """log sum exp of the steered logits, from the sums that `choose_tiles` wrote per tile."""
    lse_peaks = statistic(workspace, row, count, EXTRA + 3, -INF, LANES)
    lse_sum_exps = statistic(workspace, row, count, EXTRA + 4, 0.0, LANES)
    lse_peak = tl.max(lse_peaks)
    scale = tl.where(lse_peaks > -INF, tl.exp(lse_peaks - lse_peak), 0.0)
    return lse_peak + tl.log(tl.sum(scale * lse_sum_exps))
