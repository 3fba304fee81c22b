"""The noise of `sample`: a function of (seed, position, token id)."""

import triton
import triton.language as tl


@triton.jit
def random_bits(seed, token, position):
    """`reference.philox`: the first word of Philox4x32-10 as uint32, of the shape of `token`."""
    seed = seed.to(tl.int64)
    position = position.to(tl.int64)
    zero = tl.zeros(token.shape, tl.uint32)
    word, _, _, _ = tl.philox_impl(
        token.to(tl.uint32),
        zero + position.to(tl.uint32),
        zero + (position >> 32).to(tl.uint32),
        zero,
        zero + seed.to(tl.uint32),
        zero + (seed >> 32).to(tl.uint32),
    )
    return word


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
