"""The mathematics of a tile of logits in the Triton kernels, in the names of reference.py."""

import inspect
from typing import NamedTuple

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))  # no such name for NaN: a launch compares it with itself


class Rows(NamedTuple):
    """The operands: both `[N, V]`."""

    adapted: tl.tensor
    adapted_stride: tl.tensor
    base: tl.tensor
    base_stride: tl.tensor
    vocab: tl.tensor


class RowSteering(NamedTuple):
    """All that the steered logits of a row depend on. The peak of an invalid row is NaN."""

    peak: tl.tensor  # max z
    sum_exp: tl.tensor  # sum of e = exp(z - peak)
    mean_d: tl.tensor  # E_p[d]
    threshold: tl.tensor  # peak + log(alpha): the support is z >= threshold
    strength: tl.tensor
    penalty: tl.tensor


def kernel(function):
    """Compile a function as a Triton kernel that only dtypes and constexpr arguments specialise.

    By default Triton also specialises on integer values (1, or divisible by 16) and on the
    alignment of pointers, so a request with another vocabulary, stride or address would stall for a
    compilation. Here alignment is one explicit constexpr, ALIGNED, which `launch.warmup` covers.
    """
    arguments = inspect.signature(function).parameters.values()
    runtime = [x.name for x in arguments if x.annotation is not tl.constexpr]
    return triton.jit(do_not_specialize=runtime)(function)


@triton.jit
def per_row(shared, each, per, row):
    """`each[row]` if `per` is not 0, else `shared`: one kernel serves both."""
    return tl.load(each + row, per != 0, other=shared)


@triton.jit
def locate(matrix, stride, row, token, vocab, ALIGNED: tl.constexpr):
    """Pointers to `matrix[row, token]`, and which of them are inside the vocabulary."""
    pointers = matrix + row.to(tl.int64) * stride + token
    if ALIGNED:
        # Both hold for the caller's tensors. The arguments are not specialised, so this is how the
        # compiler learns it, and it can emit 16-byte accesses with one mask for 8 tokens.
        pointers = tl.multiple_of(pointers, 16)
        vocab = vocab // 8 * 8
    return pointers, token < vocab


@triton.jit
def load_tile(rows, row, token, ALIGNED: tl.constexpr):
    """Load the logits of both models as float32, -inf outside the vocabulary."""
    z_at, inside = locate(rows.adapted, rows.adapted_stride, row, token, rows.vocab, ALIGNED)
    b_at, inside = locate(rows.base, rows.base_stride, row, token, rows.vocab, ALIGNED)
    z = tl.load(z_at, inside, other=-INF)
    b = tl.load(b_at, inside, other=-INF)
    return z.to(tl.float32), b.to(tl.float32)


@triton.jit
def load_target(rows, row, target):
    """Load both logits of one token as float32, NaN for an id outside the vocabulary."""
    inside = (target >= 0) & (target < rows.vocab)
    wide_row = row.to(tl.int64)
    z = tl.load(rows.adapted + wide_row * rows.adapted_stride + target, inside, other=float("nan"))
    b = tl.load(rows.base + wide_row * rows.base_stride + target, inside, other=float("nan"))
    return z.to(tl.float32), b.to(tl.float32)


@triton.jit
def difference(z, b):
    """d = z - b, 0 where either is -inf."""
    return tl.where((z > -INF) & (b > -INF), z - b, 0.0)


@triton.jit
def probability(z, steering):
    """p = e / sum_exp, the probability under the adapted model."""
    return tl.exp(z - steering.peak) / steering.sum_exp


@triton.jit
def delta_of(z, b, steering):
    """delta = p (E_p[d] - d)  (10), 0 for a token that is not in base."""
    return tl.where(b > -INF, probability(z, steering) * (steering.mean_d - difference(z, b)), 0.0)


@triton.jit
def penalised(z, steering):
    """z + |strength| * penalty: the steered logit off the support, for a finite penalty."""
    return tl.fma(tl.abs(steering.strength), steering.penalty, z)


@triton.jit
def steered(z, b, steering, REMOVE: tl.constexpr):
    """z + strength * delta  (13) on the support; off it z + |strength| * penalty, or -inf.

    `topk` and `sample` with cuts read a tile several times and compare its logits, for equality
    too, with those of an earlier reading. So every kernel must compute the same bits. Left to
    itself the compiler fuses a multiply and an add in one place and not in another; an explicit
    fma leaves it no choice.
    """
    delta = delta_of(z, b, steering)
    if REMOVE:
        # strength * -inf is never formed: it is NaN for strength 0 and +inf for a negative one.
        off = -INF
    else:
        off = penalised(z, steering)
    return tl.where(z >= steering.threshold, tl.fma(delta, steering.strength, z), off)


@triton.jit
def steered_tile(rows, steering, row, token, REMOVE: tl.constexpr, ALIGNED: tl.constexpr):
    """The steered logits of a tile's tokens, -inf outside the vocabulary."""
    z, b = load_tile(rows, row, token, ALIGNED)
    return steered(z, b, steering, REMOVE)


@triton.jit
def only(lane, tile, values):
    """The value in lane `tile`."""
    return tl.sum(tl.where(lane == tile, values, 0))


@triton.jit
def accumulate(lse_peak, lse_sum_exp, logits, temperature):
    """Add a tile to the sums of log sum exp(logits / temperature).

    It is lse_peak / temperature + log(lse_sum_exp), where lse_sum_exp is relative to lse_peak.
    """
    peak = tl.maximum(lse_peak, tl.max(logits))
    origin = tl.where(peak > -INF, peak, 0.0)
    sum_exp = tl.sum(tl.exp((logits - origin) / temperature))
    return peak, lse_sum_exp * tl.exp((lse_peak - origin) / temperature) + sum_exp
