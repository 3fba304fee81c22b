"""The first pass, which reads both rows once, and the row statistics that the second pass takes.

A row is cut into tiles. `measure_tiles` writes a few numbers per tile. Every program that needs the
statistics of the whole row recomputes them from those with `combine`: it reads a few hundred bytes,
needs no atomics and gets the same bits as every other program.
"""

import triton
import triton.language as tl

from .triton_rows import (
    INF,
    LOG2E,
    LOWEST,
    Rows,
    RowSteering,
    difference,
    exp,
    exp2,
    fetch_into_l2,
    join_lse,
    kernel,
    launch_second_pass,
    load_tile,
    locate,
    wait_for_first_pass,
)

# workspace[row, :, tile]: the 4 numbers of `measure_tiles`, then its extra ones, 3 if BASE and 4 if
# MARKED, or the 5 of `choose_tiles`; then the 4 words of `mark_cells`.
STATISTICS = tl.constexpr(13)
EXTRA = tl.constexpr(4)
MARKS = tl.constexpr(9)
# Before those of the tiles: the 3 numbers of a row that `combine_rows` writes. Behind them: the
# list of `triton_blocks`, with room for ENTRIES cells or chunks, or for every tile.
# `launch.workspace_size` has the same sum.
ROW = tl.constexpr(3)
# A tile has up to 128 cells of equal size: if rows are aligned, those of its tokens that one thread
# of `measure_tiles` holds.
CELLS = tl.constexpr(128)
ENTRIES = tl.constexpr(2048)
# The numbers of a row are read by each warp as a whole, a tile per lane of the warp. Of a tensor of
# this size every warp has a copy, so a reduction of it needs no barrier.
WARP = tl.constexpr(32)
# Where the fast form is exact: exp2(z log2 e - peak log2 e) loses digits in proportion to the peak.
USUAL_PEAK = tl.constexpr(32768.0)


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def add_2(a, b, other_a, other_b):
    return a + other_a, b + other_b


@triton.jit
def max_2(a, b, other_a, other_b):
    return tl.maximum(a, other_a), tl.maximum(b, other_b)


@triton.jit
def add_3(a, b, c, other_a, other_b, other_c):
    return a + other_a, b + other_b, c + other_c


@triton.jit
def lowest(matrix):
    """The least finite number of a matrix's dtype, which is far below any usual peak."""
    if matrix.dtype.element_ty == tl.float16:
        return -65504.0
    else:
        return -3.38e38


@triton.jit
def prefetch_tile(matrix, stride, row, tile, vocab, TILE: tl.constexpr):
    """Bring a tile into the L2 cache, in sectors of 32 bytes.

    To save registers ptxas loads b only when z has come and is widened or compared: without this a
    program would wait for memory twice. Many programs in float32 keep the memory busy anyway.
    """
    BITS: tl.constexpr = matrix.dtype.element_ty.primitive_bitwidth
    SECTOR: tl.constexpr = 256 // BITS
    MOST: tl.constexpr = 2**31 - 1 if BITS == 16 else 1024
    if tl.num_programs(0) <= MOST:
        token = tl.minimum(tile * TILE + tl.arange(0, TILE // SECTOR) * SECTOR, vocab - 1)
        places = matrix + row.to(tl.int64) * stride + token
        fetch_into_l2(places)


@triton.jit
def load_finite_tile(rows, row, token, ALIGNED: tl.constexpr):
    """`load_tile` with z far below any usual peak and b = 0 outside the vocabulary."""
    z_at, inside = locate(rows.adapted, rows.adapted_stride, row, token, rows.vocab, ALIGNED)
    b_at, inside = locate(rows.base, rows.base_stride, row, token, rows.vocab, ALIGNED)
    z = tl.load(z_at, inside, other=lowest(rows.adapted))
    b = tl.load(b_at, inside, other=0.0)
    return z.to(tl.float32), b.to(tl.float32), inside


@triton.jit
def exp_from(x, peak):
    """exp(x - peak) but for a factor, and that factor, for usual peaks."""
    shift = peak * LOG2E
    rounding = tl.fma(peak, LOG2E, -shift)
    return exp2(tl.fma(x, LOG2E, -shift)), exp2(-rounding)


@triton.jit
def numbers(workspace, row, count):
    """Where the numbers of a row's tiles begin; those of the row are before."""
    size = (count * (STATISTICS + 1) + (ROW + ENTRIES)).to(tl.uint32)
    return workspace + row.to(tl.int64) * size + ROW


@triton.jit
def row_and_tile(count, reciprocal, shift):
    """The row and the tile of a program: program // count, by `launch.reciprocal`, and the rest."""
    program = tl.program_id(0).to(tl.uint32)
    row = tl.umulhi(program * 2, reciprocal.to(tl.uint32)) >> shift.to(tl.uint32)
    return row, (program - row * count.to(tl.uint32)).to(tl.int32)


@triton.constexpr_function
def shape_of(CHUNK, TILE):
    """A tile as rounds, cells and chunks: CHUNK tokens are what a thread loads at once.

    A round is what all threads load at once; a cell is at one place of every round.
    """
    cells = min(CELLS.value, TILE // CHUNK)
    return TILE // (cells * CHUNK), cells, CHUNK


@triton.constexpr_function
def words_of(CHUNK, TILE):
    """The words that mark the cells of a tile, and the bits of each."""
    cells = min(CELLS.value, TILE // CHUNK)
    return max(cells // 32, 1), min(cells, 32)


@triton.jit
def greatest_of_cells(tile, CHUNK: tl.constexpr):
    """The greatest number of each cell."""
    return tl.max(tl.max(tl.reshape(tile, shape_of(CHUNK, tile.shape[0])), 2), 0)


@triton.jit
def sums_of_cells(tile, CHUNK: tl.constexpr):
    """The sum of the numbers of each cell."""
    return tl.sum(tl.sum(tl.reshape(tile, shape_of(CHUNK, tile.shape[0])), 2), 0)


@triton.jit
def store_words(place, count, which, numbers, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """Write the sum of the numbers of each word's cells."""
    WORDS: tl.constexpr = words_of(CHUNK, TILE)[0]
    BITS: tl.constexpr = words_of(CHUNK, TILE)[1]
    words = tl.sum(tl.reshape(numbers, (WORDS, BITS)), 1, keep_dims=True)
    # Every lane of a warp has the word, so no other layout is needed for the store.
    word = tl.arange(0, WORDS)[:, None]
    lane = tl.arange(0, BITS)[None, :]
    places = place.to(tl.pointer_type(words.dtype)) + (which + word) * count + lane
    tl.store(places, tl.broadcast_to(words, (WORDS, BITS)), lane == 0)


@triton.jit
def mark_cells(place, count, marked, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """Write the tile's words, a bit for each cell, set if it is marked."""
    bits = tl.where(marked, 1 << tl.arange(0, marked.shape[0]) % 32, 0)
    store_words(place, count, MARKS, bits, CHUNK, TILE)


@triton.jit
def mark_and_sum_cells(
    place, count, marked, sums, factor, CHUNK: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """`mark_cells`; and write the sums of the other cells of each word, times `factor`."""
    mark_cells(place, count, marked, CHUNK, TILE)
    store_words(place, count, EXTRA, tl.where(marked, 0.0, sums * factor), CHUNK, TILE)


@kernel
def measure_tiles(
    adapted,
    adapted_stride: tl.int64,
    base,
    base_stride: tl.int64,
    workspace,
    vocab: tl.int32,
    log_alpha: tl.float32,
    reciprocal: tl.uint32,
    shift: tl.uint32,
    BASE: tl.constexpr,
    MARKED: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """workspace[row, :, tile] = peak, sum_exp, sum_exp_in_base, sum_exp_d of the tile.

    A NaN or +inf makes sum_exp NaN if it is an adapted logit, sum_exp_d if it is a base logit.

    If BASE: d is (z - peak) - (b - base_peak), so that a shift common to all logits is not rounded
    away, and 3 extra numbers follow: base_peak, base_sum_exp, and whether a token is possible in z
    and not in b.

    If MARKED: the words of its cells, for `triton_blocks`. A bit is set if the cell has a token
    within log(alpha) of the tile's peak; no other cell can have a token of the support. The extra
    numbers, unless BASE, are the sum_exp of these other cells, per word.

    The sums are first formed as if every logit were finite, in half the instructions. A logit that
    is not makes sum_exp_d infinite or NaN, and the tile is summed again with care.
    """
    launch_second_pass(PDL)
    count = tl.cdiv(vocab, TILE)
    row, tile = row_and_tile(count, reciprocal, shift)
    token = tile * TILE + tl.arange(0, TILE)
    rows = Rows(adapted, adapted_stride, base, base_stride, vocab)
    if ALIGNED:
        prefetch_tile(base, base_stride, row, tile, vocab, TILE)
    z, b, inside = load_finite_tile(rows, row, token, ALIGNED)
    place = numbers(workspace, row, count) + tile

    cells = greatest_of_cells(z, CHUNK)
    if BASE:
        b = tl.where(inside, b, -3.38e38)
        peak, base_peak = tl.reduce((cells, greatest_of_cells(b, CHUNK)), 0, max_2)
    else:
        peak = tl.max(cells)

    if BASE:
        e, factor = exp_from(z, peak)
        base_e, base_factor = exp_from(b, base_peak)
        d = (z - peak) - (b - base_peak)
        sums, base_sums = sums_of_cells(e, CHUNK), sums_of_cells(base_e, CHUNK)
        sums_d = sums_of_cells(tl.where(inside, e * d, 0.0), CHUNK)
        sum_exp, sum_exp_d, base_sum_exp = tl.reduce((sums, sums_d, base_sums), 0, add_3)
        base_sum_exp *= base_factor
        only_adapted = tl.cast(0, tl.int32)
        usual = tl.abs(base_peak) < USUAL_PEAK
    else:
        e, factor = exp_from(z, peak)
        sums, sums_d = sums_of_cells(e, CHUNK), sums_of_cells(e * (z - b), CHUNK)
        if MARKED:
            marked = cells >= peak + log_alpha
            mark_and_sum_cells(place, count, marked, sums, factor, CHUNK, TILE)
        sum_exp, sum_exp_d = tl.reduce((sums, sums_d), 0, add_2)
        usual = True
    sum_exp *= factor
    sum_exp_d *= factor
    sum_exp_in_base = sum_exp

    # Not sum_exp_d - sum_exp_d == 0: of that the compiler makes the rounding error of the product.
    usual &= (tl.abs(sum_exp_d) < INF) & (tl.abs(peak) < USUAL_PEAK)
    if usual == 0:
        z, b = load_tile(rows, row, token, ALIGNED)
        peak = tl.max(z)
        origin = tl.where(peak > -INF, peak, 0.0)  # so that e is 0, not NaN, if all are -inf
        e = exp(z - origin)
        if MARKED and not BASE:
            marked, sums = cells >= peak + log_alpha, sums_of_cells(e, CHUNK)
            mark_and_sum_cells(place, count, marked, sums, 1.0, CHUNK, TILE)
        d = difference(z, b)
        if BASE:
            base_peak = tl.max(b)
            base_origin = tl.where(base_peak > -INF, base_peak, 0.0)
            d = difference(z - origin, b - base_origin)
            base_sum_exp = tl.sum(exp(b - base_origin))
            only_adapted = tl.max(((z > -INF) & (b == -INF)).to(tl.int32))
        sum_exp, sum_exp_in_base, sum_exp_d = tl.reduce(
            (e, tl.where(b > -INF, e, 0.0), tl.where(b < INF, e * d, float("nan"))), 0, add_3
        )

    tl.store(place, peak)
    tl.store(place + count, sum_exp)
    tl.store(place + 2 * count, sum_exp_in_base)
    tl.store(place + 3 * count, sum_exp_d)
    if MARKED and BASE:
        mark_cells(place, count, cells >= peak + log_alpha, CHUNK, TILE)
    if BASE:
        tl.store(place + EXTRA * count, base_peak)
        tl.store(place + (EXTRA + 1) * count, base_sum_exp)
        tl.store(place + (EXTRA + 2) * count, only_adapted.to(tl.float32))


@triton.jit
def statistic(workspace, row, count, which, first, absent, LANES: tl.constexpr):
    """Load one number each of 32 tiles of a row, from `first` on; `absent` where no tile is.

    Only the last 32 of LANES are not all tiles.
    """
    tile = first + tl.arange(0, WARP)
    places = numbers(workspace, row, count) + which * count + tile
    if first + WARP < LANES:
        return tl.load(places)
    else:
        return tl.load(places, tile < count, other=absent)


@triton.jit
def relative(peaks, peak):
    """exp(peaks - peak), 0 for a tile without a possible token."""
    return tl.where(peaks > -INF, exp(peaks - peak), 0.0)


@triton.jit
def combine(workspace, row, vocab, LANES: tl.constexpr, TILE: tl.constexpr):
    """Peak (NaN if invalid), sum_exp and mean_d of a row."""
    count = tl.cdiv(vocab, TILE)
    greatest = statistic(workspace, row, count, 0, 0, -INF, LANES)
    for first in tl.static_range(32, LANES, 32):
        greatest = tl.maximum(greatest, statistic(workspace, row, count, 0, first, -INF, LANES))
    peak = tl.max(greatest)
    sum_exp = tl.zeros((WARP,), tl.float32)
    sum_exp_in_base = tl.zeros((WARP,), tl.float32)
    sum_exp_d = tl.zeros((WARP,), tl.float32)
    for first in tl.static_range(0, LANES, 32):
        # Each fma is explicit, so that every kernel computes the same bits. If no token is
        # possible, this scale is NaN.
        scale = exp(statistic(workspace, row, count, 0, first, -INF, LANES) - peak)
        sum_exp = tl.fma(scale, statistic(workspace, row, count, 1, first, 0.0, LANES), sum_exp)
        sum_exp_in_base = tl.fma(
            scale, statistic(workspace, row, count, 2, first, 0.0, LANES), sum_exp_in_base
        )
        sum_exp_d = tl.fma(scale, statistic(workspace, row, count, 3, first, 0.0, LANES), sum_exp_d)
    sum_exp, sum_exp_in_base, sum_exp_d = tl.reduce((sum_exp, sum_exp_in_base, sum_exp_d), 0, add_3)
    mean_d = tl.where(sum_exp_in_base > 0, sum_exp_d / sum_exp_in_base, 0.0)
    valid = (sum_exp == sum_exp) & (sum_exp_d == sum_exp_d)
    return tl.where(valid, peak, float("nan")), sum_exp, mean_d


@kernel
def combine_rows(
    workspace,
    vocab: tl.int32,
    PDL: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row: leave in the workspace what `combine` returns."""
    wait_for_first_pass(PDL)
    row = tl.program_id(0)
    count = tl.cdiv(vocab, TILE)
    peak, sum_exp, mean_d = combine(workspace, row, vocab, LANES, TILE)
    lane = tl.arange(0, WARP)
    combined = tl.where(lane == 0, peak, tl.where(lane == 1, sum_exp, mean_d))
    tl.store(numbers(workspace, row, count) - ROW + lane, combined, lane < ROW)


@triton.jit
def steering_of(peak, sum_exp, mean_d, strength, log_alpha, penalty, difference):
    peak += strength - strength  # NaN if the strength is not finite
    threshold = peak + log_alpha
    return RowSteering(peak, 1.0 / sum_exp, mean_d, threshold, strength, penalty, difference)


@triton.jit
def steer_row(
    workspace, row, vocab, strength, log_alpha, penalty, difference,
    LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The steering of a row."""
    peak, sum_exp, mean_d = combine(workspace, row, vocab, LANES, TILE)
    return steering_of(peak, sum_exp, mean_d, strength, log_alpha, penalty, difference)


@triton.jit
def steer_row_of_tile(
    workspace, row, vocab, combined, strength, log_alpha, penalty, difference,
    LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`steer_row`, to the bit, from what `combine_rows` wrote if `combined`."""
    if combined != 0:
        count = tl.cdiv(vocab, TILE)
        place = numbers(workspace, row, count) - ROW
        peak, sum_exp, mean_d = tl.load(place), tl.load(place + 1), tl.load(place + 2)
    else:
        peak, sum_exp, mean_d = combine(workspace, row, vocab, LANES, TILE)
    return steering_of(peak, sum_exp, mean_d, strength, log_alpha, penalty, difference)


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
def tiles_lse(workspace, row, count, LANES: tl.constexpr):
    """log sum exp of the steered logits, from the sums that `choose_tiles` wrote per tile."""
    peaks = statistic(workspace, row, count, EXTRA + 3, 0, LOWEST, LANES)
    sum_exps = statistic(workspace, row, count, EXTRA + 4, 0, 0.0, LANES)
    for first in tl.static_range(32, LANES, 32):
        peaks, sum_exps = join_lse(
            peaks,
            sum_exps,
            statistic(workspace, row, count, EXTRA + 3, first, LOWEST, LANES),
            statistic(workspace, row, count, EXTRA + 4, first, 0.0, LANES),
        )
    peak, sum_exp = tl.reduce((peaks, sum_exps), 0, join_lse)
    return peak + tl.log(sum_exp)
