"""The C++ CPU kernels (csrc/cpu), if they were built.

Nothing is loaded before the first use, and importing this module cannot fail.
"""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from svd_engine.kernels.arguments import Draw, Mask, log_alpha

CAPABILITIES = ("DEFAULT", "AVX2", "AVX512", "AVX512_BF16")
OPERATORS = (
    "steer", "steering_vector", "sample", "sample_cut", "topk", "score", "project_strength",
    "support", "divergence", "linear", "unpack", "rms_norm", "rotate", "attend", "decode",
    "capability",
)  # fmt: skip


@functools.cache
def _load() -> SimpleNamespace | str:
    """Load the operators, or return why there are none."""
    found = sorted(Path(__file__).parents[1].glob("_cpu*.so"))
    if not found:
        return (
            "svd_engine._cpu was not built; with a C++ compiler and torch in place: "
            'pip install -v --no-build-isolation ".[gguf]" in the repository'
        )
    try:
        torch.ops.load_library(str(found[0]))
        ops = torch.ops.svd_engine_cpu
        return SimpleNamespace(**{name: _called(getattr(ops, name).default) for name in OPERATORS})
    except Exception as error:
        return f"{found[0].name} failed to load: {error}"


def _called(overload: Any) -> Any:
    """Return what an operator's wrapper calls: the wrapper takes a third of a microsecond."""
    return getattr(overload, "_op", overload)


@functools.cache
def _ops() -> SimpleNamespace:
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


def unavailable() -> str | None:
    """Return why the kernels cannot run here, or None if they can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def takes(device: str) -> bool:
    """Tell whether the kernels compute on tensors on this type of device."""
    return device == "cpu"


def capability(limit: str | None = None) -> str:
    """Return the instruction set in use; `limit` first sets it to the best one not above."""
    return CAPABILITIES[_ops().capability(-1 if limit is None else CAPABILITIES.index(limit))]


def steer(adapted: Tensor, base: Tensor, mask: Mask, out: Tensor) -> None:
    """Write `reference.steer` to `out`, which may be `adapted` or `base` itself."""
    strength, alpha, penalty, direction = mask
    _ops().steer(
        adapted, base, *strength, log_alpha(alpha), penalty, direction == "difference", out
    )


def steering_vector(adapted: Tensor, base: Tensor, direction: str, out: Tensor) -> None:
    """Write `reference.steering_vector` to `out`, which may be `adapted` or `base` itself."""
    _ops().steering_vector(adapted, base, direction == "difference", out)


def sample(
    adapted: Tensor, base: Tensor, mask: Mask, draw: Draw, token: Tensor, logprob: Tensor
) -> None:
    """Write `reference.sample` to `token` (int64) and `logprob` (float32)."""
    strength, alpha, penalty, direction = mask
    difference = direction == "difference"
    if draw.is_cut:
        _ops().sample_cut(
            adapted, base, *strength, log_alpha(alpha), penalty, difference, draw.temperature,
            draw.top_k, draw.top_p, draw.min_p, *draw.seed, *draw.position, token, logprob,
        )  # fmt: skip
    else:
        _ops().sample(
            adapted, base, *strength, log_alpha(alpha), penalty, difference, draw.temperature,
            *draw.seed, *draw.position, token, logprob,
        )  # fmt: skip


def topk(adapted: Tensor, base: Tensor, mask: Mask, k: int, logprob: Tensor, token: Tensor) -> None:
    """Write `reference.topk` to `logprob` (float32) and `token` (int64), [N, k] each."""
    strength, alpha, penalty, direction = mask
    difference = direction == "difference"
    _ops().topk(adapted, base, *strength, k, log_alpha(alpha), penalty, difference, logprob, token)


def score(adapted: Tensor, base: Tensor, mask: Mask, target: Tensor, logprob: Tensor) -> None:
    """Write `reference.score` to `logprob` (float32)."""
    strength, alpha, penalty, direction = mask
    difference = direction == "difference"
    _ops().score(adapted, base, target, *strength, log_alpha(alpha), penalty, difference, logprob)


def project_strength(
    adapted: Tensor,
    base: Tensor,
    target: Tensor,
    alpha: float,
    direction: str,
    numerator: Tensor,
    gauss_newton: Tensor,
    newton: Tensor,
    in_support: Tensor,
) -> None:
    """Write `reference.project_strength` to three float32 tensors and a bool one."""
    _ops().project_strength(
        adapted, base, target, log_alpha(alpha), direction == "difference",
        numerator, gauss_newton, newton, in_support,
    )  # fmt: skip


def support(
    adapted: Tensor,
    base: Tensor,
    target: Tensor,
    alpha: float,
    direction: str,
    capacity: int,
    *outputs: Tensor,
) -> None:
    """Write `reference.support` to its eight fields, `[N, capacity]` and `[N]`."""
    difference = direction == "difference"
    _ops().support(adapted, base, target, log_alpha(alpha), difference, *outputs)


def divergence(adapted: Tensor, base: Tensor, out: Tensor) -> None:
    """Write `reference.divergence` to `out` (float32)."""
    _ops().divergence(adapted, base, out)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    first: int,
    out: Tensor,
) -> None:
    """Write x W^T + bias to `out`, plus up (down x) + up_bias in the rows from `first` on."""
    _ops().linear(x, weight, bias, down, up, up_bias, first, out)


def unpack(codes: Tensor, bits: int, out: Tensor) -> None:
    """Write a weight of codes (csrc/cpu/codes.h), uint8 `[out, bytes]`, to `out` as numbers."""
    _ops().unpack(codes, bits, out)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, rounded_between: bool, out: Tensor
) -> None:
    """Write x / rms * (weight + offset) to `out`; x is contiguous and of the weight's dtype."""
    _ops().rms_norm(x, weight, eps, offset, rounded_between, out)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Write x cos + [-x2, x1] sin to `out` for x = [x1, x2] `[rows, heads, 1, dim]`.

    cos, sin: `[rows, 1, 1, dim]`.
    """
    _ops().rotate(x, cos, sin, out)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    out: Tensor,
) -> None:
    """Write `attention.attend` for one token per row to `out` `[rows, 1, heads, dim]`.

    query: `[rows, heads, 1, dim]`; key, value: `[rows, kv_heads, slots, dim]`; mask, added to the
    scores: `[rows, 1, 1, slots]`.
    """
    _ops().attend(query, key, value, mask, scale, softcap or 0.0, out)


def decode(
    plan: Tensor,
    caches: Tensor,
    inputs: Tensor,
    positions: Tensor,
    first_adapted_row: int,
    hidden: Tensor,
    logits: Tensor | None,
) -> None:
    """Run new tokens through a decoder; write hidden states `[rows, q, H]` and logits if given.

    plan, caches: int64, the words of csrc/cpu/decoder.h. inputs: embeddings `[rows, q, H]`;
    positions: int64 `[rows]`, the cache slot of each row's first new token.
    """
    _ops().decode(plan, caches, inputs, positions, first_adapted_row, hidden, logits)
