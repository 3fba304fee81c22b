"""The noise of `sample`: a function of (seed, position, token id)."""

import triton
import triton.language as tl


@triton.jit
def four_words(seed, four, position):
    """The words of Philox4x32-10 of the counters `four`, as uint32 of its shape."""
    seed = seed.to(tl.int64)
    position = position.to(tl.int64)
    zero = tl.zeros(four.shape, tl.uint32)
    return tl.philox_impl(
        four.to(tl.uint32),
        zero + position.to(tl.uint32),
        zero + (position >> 32).to(tl.uint32),
        zero,
        zero + seed.to(tl.uint32),
        zero + (seed >> 32).to(tl.uint32),
    )


@triton.jit
def random_bits(seed, token, position, RUN: tl.constexpr):
    """`reference.philox` as uint32, of the shape of `token`.

    If RUN is a multiple of 4, the last axis of `token` is runs of so many consecutive ids, of which
    the first is a multiple of 4: four tokens then share a counter.
    """
    if RUN % 4 == 0:
        fours = tl.reshape(token, (token.numel // 4, 2, 2))
        first, _ = tl.split(tl.split(fours)[0])
        word0, word1, word2, word3 = four_words(seed, first >> 2, position)
        words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
        return tl.reshape(words, token.shape)
    else:
        word0, word1, word2, word3 = four_words(seed, token >> 2, position)
        even = tl.where(token & 2 == 0, word0, word2)
        odd = tl.where(token & 2 == 0, word1, word3)
        return tl.where(token & 1 == 0, even, odd)


@triton.jit
def gumbel_noise(bits):
    """`reference.gumbel_noise` of 32 random bits, to float32 rounding: -log(-log(1 - u)).

    The lesser of u and 1 - u is exact to its last bit near 0, so no tail is clipped.
    """
    low = bits < 0x80000000
    u = (tl.where(low, bits, bits ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.0**-32
    # -log(1 - u) = 2 atanh(u / (2 - u)); for u <= 1/2 the series has an error below 2e-9.
    s = u / (2.0 - u)
    w = s * s
    series = 1 / 9 + w * (1 / 11 + w * (1 / 13 + w * (1 / 15)))
    series = 1.0 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * series)))
    exponential = tl.where(low, 2.0 * s * series, -tl.log(u))
    return -tl.log(exponential)
