"""The Triton backend, host side: what is launched, with how much memory and which tiles.

`svd_engine.ops` has checked the arguments. Nothing is read back from the device, so every call can
be captured in a CUDA graph.
"""

import math
import os

import torch
from torch import Tensor

from .reference import Strength, log_alpha
from .triton_rows import STATISTICS, measure_tiles
from .triton_sample import sample_rows
from .triton_steer import steer_tiles

# What one program takes of a row. It does not depend on the batch, so neither does a row's result,
# to the bit.
TILE = 2048
STREAM_WARPS = 4  # programs that stream one tile each
SAMPLE_WARPS = 8  # a program that walks a row's tiles one after the other


def unavailable() -> str | None:
    """Why Triton cannot run here, or None if it can. Without Triton this module does not import."""
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
        return None
    return "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"


def takes(device: str) -> bool:
    """Whether tensors on this type of device can be launched on."""
    return device == ("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


def workspace_size(rows: int, vocab: int) -> int:
    """The float32 elements that a call on `[rows, vocab]` needs as `workspace`."""
    return rows * STATISTICS.value * _tiles(vocab)


def steer(
    adapted: Tensor,
    base: Tensor,
    strength: Strength,
    alpha: float,
    penalty: float,
    out: Tensor,
    *,
    workspace: Tensor | None = None,
) -> None:
    """out = reference.steer(adapted, base, strength).

    adapted, base, out: `[N, V]`, each float32, bfloat16 or float16, last stride 1. strength: a
    number or float32 `[N]`. workspace: float32 `[workspace_size(N, V)]` or more.
    """
    rows, vocab = adapted.shape
    if rows == 0:
        return
    with torch.cuda.device_of(adapted):  # Triton launches on the current device
        workspace = _measure(adapted, base, workspace)
        steer_tiles[(rows * _tiles(vocab),)](
            adapted,
            adapted.stride(0),
            base,
            base.stride(0),
            workspace,
            *_per_row(strength),
            log_alpha(alpha),
            penalty,
            out,
            out.stride(0),
            vocab,
            REMOVE=penalty == -math.inf,
            ALIGNED=_aligned(adapted, base, out),
            LANES=_lanes(vocab),
            TILE=TILE,
            num_warps=STREAM_WARPS,
            enable_fp_fusion=True,
        )


def sample(
    adapted: Tensor,
    base: Tensor,
    strength: Strength,
    alpha: float,
    penalty: float,
    temperature: float,
    seed: int | Tensor,
    position: int | Tensor,
    token: Tensor,
    logprob: Tensor,
    *,
    workspace: Tensor | None = None,
) -> None:
    """token, logprob = reference.sample(adapted, base, strength) without cuts.

    adapted, base: `[N, V]`, each float32, bfloat16 or float16, last stride 1. strength: a number or
    float32 `[N]`. seed, position: numbers or int64 `[N]`. token int64 and logprob float32: `[N]`.
    workspace: float32 `[workspace_size(N, V)]` or more.
    """
    rows, vocab = adapted.shape
    if rows == 0:
        return
    with torch.cuda.device_of(adapted):
        workspace = _measure(adapted, base, workspace)
        sample_rows[(rows,)](
            adapted,
            adapted.stride(0),
            base,
            base.stride(0),
            workspace,
            *_per_row(strength),
            log_alpha(alpha),
            penalty,
            temperature,
            *_per_row(seed),
            *_per_row(position),
            token,
            logprob,
            vocab,
            REMOVE=penalty == -math.inf,
            GREEDY=temperature == 0,
            ALIGNED=_aligned(adapted, base),
            LANES=_lanes(vocab),
            TILE=TILE,
            num_warps=SAMPLE_WARPS,
            enable_fp_fusion=True,
        )


def _measure(adapted: Tensor, base: Tensor, workspace: Tensor | None) -> Tensor:
    rows, vocab = adapted.shape
    size = workspace_size(rows, vocab)
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.float32, device=adapted.device)
    assert workspace.dtype == torch.float32 and workspace.is_contiguous()
    assert workspace.numel() >= size, f"workspace: {workspace.numel()} elements, {size} needed"
    measure_tiles[(rows * _tiles(vocab),)](
        adapted,
        adapted.stride(0),
        base,
        base.stride(0),
        workspace,
        vocab,
        ALIGNED=_aligned(adapted, base),
        TILE=TILE,
        num_warps=STREAM_WARPS,
        enable_fp_fusion=True,
    )
    return workspace


def _tiles(vocab: int) -> int:
    return -(-vocab // TILE)


def _lanes(vocab: int) -> int:
    """A power of two that holds a row's tiles; at least a warp, so that few V differ in it."""
    return max(32, 1 << (_tiles(vocab) - 1).bit_length())


def _aligned(*rows: Tensor) -> bool:
    """Whether 16-byte loads and stores fit every row, however many rows there are."""
    return all(
        x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0 and x.shape[1] % 8 == 0
        for x in rows
    )


def _per_row(value: float | Tensor) -> tuple[float, Tensor | None]:
    """One number for all rows or a tensor with one for each: what `triton_rows.per_row` takes."""
    return (0, value.contiguous()) if isinstance(value, Tensor) else (value, None)
