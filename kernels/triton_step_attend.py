"""Attention of new tokens over a KV cache whose lengths lie on the device.

The slots that a token sees are split among as many programs as its own length fills, so the bits
of a token depend neither on other rows nor on the room in the cache.
"""

import triton
import triton.language as tl

from .triton_linear import NO_BFLOAT16, wait_for_kernel_before
from .triton_rows import INF, exp, kernel
from .triton_step_rows import rounded, tanh

SPLITS = tl.constexpr(32)


@triton.jit
def seen(positions, row, new, window, room, BLOCK: tl.constexpr):
    """The first slot that a token sees, the end of them, and how many each split takes."""
    position = tl.load(positions + row // new) + row % new
    end = tl.minimum(position + 1, room).to(tl.int32)
    begin = end * 0
    if window > 0:
        begin = tl.maximum(begin, end - window)
    span = tl.cdiv(tl.cdiv(end - begin, SPLITS), BLOCK) * BLOCK
    return begin, end, span


@kernel
def attend_tiles(
    query,
    keys,
    values,
    positions,
    new: tl.int32,
    slots,
    window: tl.int32,
    heads: tl.int32,
    kv_heads: tl.int32,
    scaling: tl.float32,
    softcap: tl.float32,
    sums,
    peaks,
    SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program per split of a key head of a token.

    sums: float32 `[rows, heads, SPLITS, DIM]`, of exp(score - peak) value; peaks: float32
    `[rows, heads, SPLITS, 2]`, the peak and the sum of exp(score - peak).
    """
    split = tl.program_id(0) % SPLITS
    kv_head = tl.program_id(0) // SPLITS % kv_heads
    row = tl.program_id(0) // SPLITS // kv_heads
    wait_for_kernel_before(OVERLAP)
    room = tl.load(slots)
    begin, end, span = seen(positions, row, new, window, room, BLOCK)
    group = heads // kv_heads
    member = tl.arange(0, GROUP)
    lane = tl.arange(0, LANES)
    inside = lane < DIM
    real = member < group
    head = tl.cast(row, tl.int64) * heads + kv_head * group + member
    q_places = query + (head * DIM)[:, None] + lane[None, :]
    if ALIGNED:
        q_places = tl.multiple_of(q_places, (1, 16))
    q = tl.load(q_places, real[:, None] & inside[None, :], other=0.0)
    begin += split * span
    end = tl.minimum(begin + span, end)
    if begin < end:
        at = (tl.cast(row // new, tl.int64) * kv_heads + kv_head) * room * DIM
        peak = tl.full((GROUP,), -INF, tl.float32)
        total = tl.zeros((GROUP,), tl.float32)
        out = tl.zeros((GROUP, LANES), tl.float32)
        if NO_BFLOAT16:
            q = q.to(tl.float32)
        for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
            slot = start + tl.arange(0, BLOCK)
            places = slot[:, None] * DIM + lane[None, :]  # of a head: within 32 bits
            k_places, v_places = keys + at + places, values + at + places
            if ALIGNED:
                k_places = tl.multiple_of(k_places, (1, 16))
                v_places = tl.multiple_of(v_places, (1, 16))
            here = slot < end
            k = tl.load(k_places, here[:, None] & inside[None, :], other=0.0)
            v = tl.load(v_places, here[:, None] & inside[None, :], other=0.0)
            if NO_BFLOAT16:
                k = k.to(tl.float32)
                v = v.to(tl.float32)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
            if SOFTCAP:
                score = softcap * tanh(score / softcap)
            score = tl.where(here[None, :], score, -INF)
            higher = tl.maximum(peak, tl.max(score, 1))
            shrink = exp(peak - higher)
            weight = exp(score - higher[:, None])
            total = total * shrink + tl.sum(weight, 1)
            out = tl.dot(weight.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
            peak = higher
        place = head * SPLITS + split
        tl.store(peaks + 2 * place, peak, real)
        tl.store(peaks + 2 * place + 1, total, real)
        sums_at = sums + place[:, None] * DIM + lane[None, :]
        tl.store(sums_at, out, real[:, None] & inside[None, :])


@kernel
def attend_rows(
    sums,
    peaks,
    positions,
    new: tl.int32,
    slots,
    window: tl.int32,
    heads: tl.int32,
    first_adapted: tl.int32,
    input_scale,
    out,
    INPUT_SCALED: tl.constexpr,
    DIM: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program per head of a token: out `[rows, heads, DIM]`, in adapted rows * input_scale."""
    head = tl.program_id(0) % heads
    row = tl.program_id(0) // heads
    wait_for_kernel_before(OVERLAP)
    begin, end, span = seen(positions, row, new, window, tl.load(slots), BLOCK)
    lane = tl.arange(0, LANES)
    inside = lane < DIM
    split = tl.arange(0, SPLITS)
    real = split * span < end - begin
    place = (tl.cast(row, tl.int64) * heads + head) * SPLITS + split
    peak = tl.load(peaks + 2 * place, real, other=-INF)
    total = tl.load(peaks + 2 * place + 1, real, other=0.0)
    weight = exp(peak - tl.max(peak, 0))
    part = tl.load(
        sums + place[:, None] * DIM + lane[None, :], real[:, None] & inside[None, :], other=0.0
    )
    result = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0)
    dtype = out.dtype.element_ty
    if INPUT_SCALED:
        scaled = tl.where(row >= first_adapted, DIM, 0)
        factor = tl.load(input_scale + head * DIM + lane, lane < scaled, other=1.0)
        result = rounded(result, dtype) * factor.to(tl.float32)
    at = (tl.cast(row, tl.int64) * heads + head) * DIM
    tl.store(out + at + lane, result.to(dtype), inside)
