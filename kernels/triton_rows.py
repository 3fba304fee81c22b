"""The mathematics of a tile of logits in the Triton kernels, in the names of reference.py."""

import inspect
import os
from typing import NamedTuple

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))  # no such name for NaN: a launch compares it with itself
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


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
    scale: tl.tensor  # 1 / sum_exp, the sum of e = exp(z - peak)
    mean_d: tl.tensor  # E_p[d]
    threshold: tl.tensor  # peak + log(alpha): the support is z >= threshold
    strength: tl.tensor
    penalty: tl.tensor
    difference: tl.tensor  # whether delta is not multiplied by p


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
def launch_second_pass(PDL: tl.constexpr):
    """Let the next kernel start as soon as every program of this one has."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_first_pass(PDL: tl.constexpr):
    """Wait until the kernel before this one has ended; nothing is read or written before that."""
    if PDL:
        tl.extra.cuda.gdc_wait()


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
        if len(token.shape) == 3:
            pointers = tl.multiple_of(pointers, (1, 1, 16))
        else:
            pointers = tl.multiple_of(pointers, 16)
        vocab = (vocab.to(tl.uint32) // 8 * 8).to(tl.int32)  # one step if unsigned
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
def fetch_into_l2(places):
    """Bring the cache lines of these pointers into the L2 cache. Nothing is loaded."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // $0", "=r,l", [places.to(tl.int64)], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def exp2(x):
    """2 ** x, and 0 for a result that is not a normal number.

    Triton's own takes five instructions, three of them for the results below 2 ** -126.
    """
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def exp(x):
    """e ** x by `exp2`, whose argument is rounded: for x = -60 the result is good to 5e-6."""
    if INTERPRETED:
        return tl.exp(x)
    else:
        return exp2(x * LOG2E)


@triton.jit
def difference(z, b):
    """d = z - b, 0 where either is -inf."""
    return tl.where((z > -INF) & (b > -INF), z - b, 0.0)


@triton.jit
def probability(z, steering):
    """p = e / sum_exp, the probability under the adapted model."""
    return exp(z - steering.peak) * steering.scale


@triton.jit
def delta_of(z, b, steering):
    """delta = p (E_p[d] - d)  (10), or without p; 0 where z or b is -inf."""
    weight = tl.where(steering.difference != 0, 1.0, probability(z, steering))
    return tl.where((z > -INF) & (b > -INF), weight * (steering.mean_d - (z - b)), 0.0)


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
def accumulate(lse_peak, lse_sum_exp, logits):
    """Add a tile to the sums of log sum exp(logits), element by element.

    Each is lse_peak + log(lse_sum_exp), where lse_sum_exp is relative to lse_peak; the first
    lse_peak is LOWEST, so that no difference is of two infinities.
    """
    away = logits - lse_peak
    e = exp(-tl.abs(away))
    lse_sum_exp = tl.where(away > 0, lse_sum_exp * e + 1.0, lse_sum_exp + e)
    return tl.maximum(lse_peak, logits), lse_sum_exp


@triton.jit
def join_lse(lse_peak, lse_sum_exp, other_peak, other_sum_exp):
    """The sums of log sum exp of two parts together."""
    away = other_peak - lse_peak
    e = exp(-tl.abs(away))
    sum_exp = tl.where(away > 0, lse_sum_exp * e + other_sum_exp, lse_sum_exp + other_sum_exp * e)
    return tl.maximum(lse_peak, other_peak), sum_exp


@triton.jit
def comes_first(merit, token, other_merit, other_token):
    """Whether a token is chosen before another one: of equal merits the lower id is."""
    return (merit > other_merit) | ((merit == other_merit) & (token < other_token))
