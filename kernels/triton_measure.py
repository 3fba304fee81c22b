"""The pass that reads the two rows once, and what every operator takes from it.

A row is cut into tiles. `measure_tiles` leaves a few numbers a tile. Whoever needs the row's own
combines them again with `combine`: a few hundred bytes, no atomics, the same bits in every program.
"""

import triton
import triton.language as tl

from .triton_rows import INF, NAN, Rows, Steering, difference, kernel, load_tile

# workspace[row, :, tile]: 4 numbers of `measure_tiles`, then 2 more or the 5 of `choose_tiles`.
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
    """workspace[row, :, tile] = max z, sum e, sum e where b > -inf, sum e * d; e = exp(z - max z).

    A NaN or +inf makes the sum of e NaN if it is adapted, that of e * d if it is base.

    If BASE: d is (z - max z) - (b - max b), so that no common shift is rounded away, and the extras
    are max b, or +inf if a token is possible in z alone, and sum exp(b - max b).
    """
    count = tl.cdiv(vocab, TILE)
    row = tl.program_id(0) // count
    tile = tl.program_id(0) % count
    token = tile * TILE + tl.arange(0, TILE)
    at = Rows(adapted, adapted_stride, base, base_stride, vocab)
    z, b = load_tile(at, row, token, ALIGNED)
    place = workspace + row.to(tl.int64) * (STATISTICS * count) + tile

    top = tl.max(z)
    zero = tl.where(top > -INF, top, 0.0)  # 0, not NaN, where the whole tile is -inf
    e = tl.exp(z - zero)
    valid = b < INF
    opinion = b > -INF
    d = difference(z, b)
    if BASE:
        base_top = tl.max(b)
        base_zero = tl.where(base_top > -INF, base_top, 0.0)
        d = difference(z - zero, b - base_zero)
        alone = tl.max(((z > -INF) & (b == -INF)).to(tl.int32))
        tl.store(place + EXTRA * count, tl.where(alone > 0, INF, base_top))
        tl.store(place + (EXTRA + 1) * count, tl.sum(tl.exp(b - base_zero)))

    tl.store(place, top)
    tl.store(place + count, tl.sum(e))
    tl.store(place + 2 * count, tl.sum(tl.where(opinion, e, 0.0)))
    tl.store(place + 3 * count, tl.sum(tl.where(valid, e * d, NAN)))


@triton.jit
def statistic(workspace, row, count, which, absent, LANES: tl.constexpr):
    """One number of every tile of a row, `absent` in the lanes that have no tile."""
    lane = tl.arange(0, LANES)
    place = workspace + (row.to(tl.int64) * STATISTICS + which) * count
    return tl.load(place + lane, lane < count, other=absent)


@triton.jit
def combine(workspace, row, vocab, LANES: tl.constexpr, TILE: tl.constexpr):
    """The max and the sum of e of each tile; of the row max z, NaN if invalid, sum e, E_p[d]."""
    count = tl.cdiv(vocab, TILE)
    tops = statistic(workspace, row, count, 0, -INF, LANES)
    sums = statistic(workspace, row, count, 1, 0.0, LANES)
    top = tl.max(tops)
    scale = tl.where(tops > -INF, tl.exp(tops - top), 0.0)
    total = tl.sum(scale * sums)
    mass = tl.sum(scale * statistic(workspace, row, count, 2, 0.0, LANES))
    weighted = tl.sum(scale * statistic(workspace, row, count, 3, 0.0, LANES))
    mean = tl.where(mass > 0, weighted / mass, 0.0)
    valid = (top > -INF) & (total == total) & (weighted == weighted)
    return tops, sums, tl.where(valid, top, NAN), total, mean


@triton.jit
def steer_row(
    workspace, row, vocab, mu, log_alpha, penalty, LANES: tl.constexpr, TILE: tl.constexpr
):
    """The max of each tile, the sum of e of each tile, and what steers the row."""
    tops, sums, top, total, mean = combine(workspace, row, vocab, LANES, TILE)
    return tops, sums, Steering(top, total, mean, top + log_alpha, mu, penalty)


@triton.jit
def has_tokens(tops, by, REMOVE: tl.constexpr):
    """Whether a tile with this max has a token left. No tile of an invalid row has."""
    if REMOVE:
        return (tops >= by.threshold) & (tops > -INF)
    else:
        return (tops >= by.top - INF) & (tops > -INF)


@triton.jit
def next_tile(live, after, LANES: tl.constexpr):
    """The first live tile after this one, or LANES: `while tile < LANES` walks them."""
    lane = tl.arange(0, LANES)
    return tl.min(tl.where(live & (lane > after), lane, LANES))


@triton.jit
def tiles_lse(workspace, row, count, LANES: tl.constexpr):
    """log sum exp of the steered logits from the tiles' peaks and masses."""
    peaks = statistic(workspace, row, count, EXTRA + 3, -INF, LANES)
    masses = statistic(workspace, row, count, EXTRA + 4, 0.0, LANES)
    peak = tl.max(peaks)
    scale = tl.where(peaks > -INF, tl.exp(peaks - peak), 0.0)
    return peak + tl.log(tl.sum(scale * masses))
