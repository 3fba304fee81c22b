"""The row mathematics of the Triton operators, and the pass that reads the two rows once.

A row is cut into tiles. `measure_tiles` leaves four numbers a tile. Whoever needs the row's own
combines them again with `combine`: a few hundred bytes, no atomics, the same bits in every program.
"""

import inspect

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))
STATISTICS = tl.constexpr(4)


def kernel(function):
    """A Triton kernel that only dtypes and constexpr arguments specialise.

    No size, stride or address that a request may bring compiles it anew.
    """
    arguments = inspect.signature(function).parameters.values()
    runtime = [x.name for x in arguments if x.annotation is not tl.constexpr]
    return triton.jit(do_not_specialize=runtime)(function)


@triton.jit
def per_row(shared, each, row):
    """`each[row]`, or `shared` where `each` is None."""
    if each is None:
        return shared
    else:
        return tl.load(each + row)


@triton.jit
def locate(rows, stride, row, token, vocab, ALIGNED: tl.constexpr):
    """Pointers to `rows[row, token]`, and which of them are inside the vocabulary."""
    pointers = rows + row.to(tl.int64) * stride + token
    if ALIGNED:
        # True of the caller's tensors; said in a form from which the compiler makes vectors.
        pointers = tl.multiple_of(pointers, 16)
        vocab = vocab // 8 * 8
    return pointers, token < vocab


@triton.jit
def load_tile(adapted, adapted_stride, base, base_stride, row, token, vocab, ALIGNED: tl.constexpr):
    """Both rows' logits in float32, -inf outside the vocabulary."""
    z_at, inside = locate(adapted, adapted_stride, row, token, vocab, ALIGNED)
    b_at, inside = locate(base, base_stride, row, token, vocab, ALIGNED)
    z = tl.load(z_at, inside, other=-INF)
    b = tl.load(b_at, inside, other=-INF)
    return z.to(tl.float32), b.to(tl.float32)


@triton.jit
def difference(z, b):
    """d = z - b, 0 where either is -inf."""
    return tl.where((z > -INF) & (b > -INF), z - b, 0.0)


@triton.jit
def steered(z, b, top, total, mean, strength, threshold, penalty, REMOVE: tl.constexpr):
    """z + strength * delta  (13) on the support; off it z + |strength| * penalty, or -inf."""
    p = tl.exp(z - top) / total
    delta = tl.where(b > -INF, p * (mean - difference(z, b)), 0.0)
    if REMOVE:
        # strength * -inf is never formed: it is NaN at 0 and +inf below.
        off = tl.full(z.shape, -INF, tl.float32)
    else:
        off = z + tl.abs(strength) * penalty
    return tl.where(z >= threshold, z + strength * delta, off)


@kernel
def measure_tiles(
    adapted,
    adapted_stride: tl.int64,
    base,
    base_stride: tl.int64,
    workspace,
    vocab: tl.int32,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """workspace[row, :, tile] = max z, sum e, sum e where b > -inf, sum e * d; e = exp(z - max z).

    A NaN or +inf makes the sum of e NaN if it is adapted, that of e * d if it is base.
    """
    count = tl.cdiv(vocab, TILE)
    row = tl.program_id(0) // count
    tile = tl.program_id(0) % count
    token = tile * TILE + tl.arange(0, TILE)
    z, b = load_tile(adapted, adapted_stride, base, base_stride, row, token, vocab, ALIGNED)

    top = tl.max(z)
    e = tl.exp(z - tl.where(top > -INF, top, 0.0))  # 0, not NaN, where the whole tile is -inf
    weighted = tl.where(b < INF, e * difference(z, b), NAN)

    place = workspace + row.to(tl.int64) * (STATISTICS * count) + tile
    tl.store(place, top)
    tl.store(place + count, tl.sum(e))
    tl.store(place + 2 * count, tl.sum(tl.where(b > -INF, e, 0.0)))
    tl.store(place + 3 * count, tl.sum(weighted))


@triton.jit
def combine(workspace, row, count, LANES: tl.constexpr):
    """Of a row: the max of each tile, max z, sum e, E_p[d]. An invalid row's max z is NaN."""
    lane = tl.arange(0, LANES)
    inside = lane < count
    place = workspace + row.to(tl.int64) * (STATISTICS * count) + lane
    tops = tl.load(place, inside, other=-INF)
    top = tl.max(tops)
    scale = tl.where(tops > -INF, tl.exp(tops - top), 0.0)
    total = tl.sum(scale * tl.load(place + count, inside, other=0.0))
    mass = tl.sum(scale * tl.load(place + 2 * count, inside, other=0.0))
    weighted = tl.sum(scale * tl.load(place + 3 * count, inside, other=0.0))
    mean = tl.where(mass > 0, weighted / mass, 0.0)
    valid = (top > -INF) & (total == total) & (weighted == weighted)
    return tops, tl.where(valid, top, NAN), total, mean


@triton.jit
def tile_threshold(top, threshold, REMOVE: tl.constexpr):
    """A tile whose max is under this has no token left. No tile reaches an invalid row's, a NaN."""
    if REMOVE:
        return threshold
    else:
        return top - INF
