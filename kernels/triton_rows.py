"""The row mathematics of the Triton operators: what is computed of the logits of a tile."""

import inspect
from typing import NamedTuple

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))


class Rows(NamedTuple):
    """The operands: both `[N, V]`."""

    adapted: tl.tensor
    adapted_stride: tl.tensor
    base: tl.tensor
    base_stride: tl.tensor
    vocab: tl.tensor


class Steering(NamedTuple):
    """What the steered logits of a row follow from. An invalid row's top is NaN."""

    top: tl.tensor  # max z
    total: tl.tensor  # sum exp(z - top)
    mean: tl.tensor  # E_p[d]
    threshold: tl.tensor  # of the support
    strength: tl.tensor
    penalty: tl.tensor


def kernel(function):
    """A Triton kernel that only dtypes and constexpr arguments specialise.

    No size, stride or address that a request may bring compiles it anew.
    """
    arguments = inspect.signature(function).parameters.values()
    runtime = [x.name for x in arguments if x.annotation is not tl.constexpr]
    return triton.jit(do_not_specialize=runtime)(function)


@triton.jit
def per_row(shared, each, per, row):
    """`each[row]` if `per`, or `shared`: one kernel for both."""
    return tl.load(each + row, per != 0, other=shared)


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
def load_tile(at, row, token, ALIGNED: tl.constexpr):
    """Both rows' logits in float32, -inf outside the vocabulary."""
    z_at, inside = locate(at.adapted, at.adapted_stride, row, token, at.vocab, ALIGNED)
    b_at, inside = locate(at.base, at.base_stride, row, token, at.vocab, ALIGNED)
    z = tl.load(z_at, inside, other=-INF)
    b = tl.load(b_at, inside, other=-INF)
    return z.to(tl.float32), b.to(tl.float32)


@triton.jit
def load_target(at, row, target):
    """Both rows' logits of one token in float32, NaN for an id outside the vocabulary."""
    inside = (target >= 0) & (target < at.vocab)
    here = row.to(tl.int64)
    z = tl.load(at.adapted + here * at.adapted_stride + target, inside, other=NAN)
    b = tl.load(at.base + here * at.base_stride + target, inside, other=NAN)
    return z.to(tl.float32), b.to(tl.float32)


@triton.jit
def difference(z, b):
    """d = z - b, 0 where either is -inf."""
    return tl.where((z > -INF) & (b > -INF), z - b, 0.0)


@triton.jit
def probability(z, by):
    return tl.exp(z - by.top) / by.total


@triton.jit
def direction(z, b, by):
    """delta = p (E_p[d] - d), 0 where the base has no opinion  (10)."""
    return tl.where(b > -INF, probability(z, by) * (by.mean - difference(z, b)), 0.0)


@triton.jit
def penalised(z, by):
    """What a finite penalty makes of a logit off the support."""
    return tl.fma(tl.abs(by.strength), by.penalty, z)


@triton.jit
def steered(z, b, by, REMOVE: tl.constexpr):
    """z + strength * delta  (13) on the support; off it z + |strength| * penalty, or -inf.

    The sums are fused by name, so that every place that computes one gets the same bits: what is
    picked in order, or cut, is compared again with what was seen before.
    """
    delta = direction(z, b, by)
    if REMOVE:
        # strength * -inf is never formed: it is NaN at 0 and +inf below.
        off = -INF
    else:
        off = penalised(z, by)
    return tl.where(z >= by.threshold, tl.fma(delta, by.strength, z), off)


@triton.jit
def steered_tile(at, by, row, token, REMOVE: tl.constexpr, ALIGNED: tl.constexpr):
    """The steered logits of a tile's tokens, -inf outside the vocabulary."""
    z, b = load_tile(at, row, token, ALIGNED)
    return steered(z, b, by, REMOVE)


@triton.jit
def only(lane, tile, values):
    """The value of one lane."""
    return tl.sum(tl.where(lane == tile, values, 0))


@triton.jit
def grow(peak, mass, logits, temperature):
    """log sum exp(logits / temperature) is peak / temperature + log(mass), one tile more."""
    higher = tl.maximum(peak, tl.max(logits))
    shift = tl.where(higher > -INF, higher, 0.0)
    more = tl.sum(tl.exp((logits - shift) / temperature))
    return higher, mass * tl.exp((peak - shift) / temperature) + more
