"""The pass of `sample` that picks the token, and its noise."""

import triton
import triton.language as tl

from .triton_rows import INF, combine, kernel, load_tile, per_row, steered, tile_threshold


@triton.jit
def random_bits(seed, token, position):
    """reference.philox: the first word of Philox4x32-10, uint32 of token's shape."""
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
    """reference.gumbel_noise of the 32 random bits, to float32 rounding: -log(-log(1 - u)).

    u, or 1 - u if that is less, is exact to its last bit near 0, so no tail is clipped.
    """
    low = bits < 0x80000000
    u = (tl.where(low, bits, bits ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.0**-32
    # -log(1 - u) = 2 atanh(u / (2 - u)): with u <= 1/2 the series is right to 2e-9.
    s = u / (2.0 - u)
    w = s * s
    series = 1 / 9 + w * (1 / 11 + w * (1 / 13 + w * (1 / 15)))
    series = 1.0 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * series)))
    exponential = tl.where(low, 2.0 * s * series, -tl.log(u))
    return -tl.log(exponential)


@kernel
def sample_rows(
    adapted,
    adapted_stride: tl.int64,
    base,
    base_stride: tl.int64,
    workspace,
    strength: tl.float32,
    strengths,
    log_alpha: tl.float32,
    penalty: tl.float32,
    temperature: tl.float32,
    seed: tl.int64,
    seeds,
    position: tl.int64,
    positions,
    token_out,
    logprob_out,
    vocab: tl.int32,
    REMOVE: tl.constexpr,
    GREEDY: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One row: the best token and its log-probability, from the tiles that can hold it.

    If REMOVE, those are the tiles with support; otherwise all but the impossible ones.
    """
    row = tl.program_id(0)
    count = tl.cdiv(vocab, TILE)
    lane = tl.arange(0, LANES)
    tops, top, total, mean = combine(workspace, row, count, LANES)
    threshold = top + log_alpha
    mu = per_row(strength, strengths, row)
    seed_here = per_row(seed, seeds, row)
    position_here = per_row(position, positions, row)
    live = (tops >= tile_threshold(top, threshold, REMOVE)) & (tops > -INF)

    # An invalid row has no live tile, and what stands here then is its result.
    best = -INF  # the greatest merit, its token and the steered logit of that
    best_token = -1
    best_logit = -INF
    peak = -INF  # log sum exp of the steered logits is peak + log(mass)
    mass = 0.0
    tile = tl.min(tl.where(live, lane, count))
    while tile < count:
        token = tile * TILE + tl.arange(0, TILE)
        z, b = load_tile(adapted, adapted_stride, base, base_stride, row, token, vocab, ALIGNED)
        z_hat = steered(z, b, top, total, mean, mu, threshold, penalty, REMOVE)
        merit = z_hat
        if not GREEDY:
            bits = random_bits(seed_here, token, position_here)
            # Relative to top, so that large logits do not round the noise away.
            merit = (z_hat - top) / temperature + gumbel_noise(bits)
        merit_here, index = tl.max(merit, 0, return_indices=True)
        if merit_here > best:  # strictly: ties go to the lowest token id
            best = merit_here
            best_token = tile * TILE + index
            best_logit = tl.sum(tl.where(token == best_token, z_hat, 0.0))

        peak_here = tl.maximum(peak, tl.max(z_hat))
        shift = tl.where(peak_here > -INF, peak_here, 0.0)
        mass = mass * tl.exp(peak - shift) + tl.sum(tl.exp(z_hat - shift))
        peak = peak_here
        tile = tl.min(tl.where(live & (lane > tile), lane, count))

    tl.store(token_out + row, best_token)
    tl.store(logprob_out + row, best_logit - peak - tl.log(mass))
