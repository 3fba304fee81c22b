"""Linear layers: native where that is faster, for few rows or for any, else PyTorch."""

import functools
import sys

import torch
from torch import Tensor, nn

from svd_engine.ops import cpu

LowRank = tuple[Tensor, Tensor, Tensor | None]  # down [r, in], up [out, r], up_bias [out]
FEW = 4  # fewer rows are multiplied in bfloat16: widening the weights would take longer
PIECE = 1 << 20  # elements of a weight that are widened at once
PLAIN = (Tensor, nn.Parameter)  # a quantised weight is a tensor of its own kind


@functools.cache
def most_rows(dtype: torch.dtype) -> int:
    """Return up to how many rows the native linear is faster than PyTorch's."""
    if dtype not in (torch.float32, torch.bfloat16) or cpu.unavailable() is not None:
        return 0
    capability = cpu.capability()
    if capability == "DEFAULT":
        return 0
    if capability != "AVX2":
        return 16
    return 512 if dtype == torch.float32 else sys.maxsize  # PyTorch widens bfloat16 at each product


def can_run_natively(first: Tensor, *others: Tensor) -> bool:
    """Whether the native kernels of a decode step accept these tensors here and now."""
    dtype = first.dtype
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or not first.is_cpu
        or not most_rows(dtype)
    ):
        return False
    for x in others:
        if x.dtype != dtype or not x.is_cpu or type(x) not in PLAIN:
            return False
    return True


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    low_rank: LowRank | None = None,
    first_adapted_row: int = 0,
) -> Tensor:
    """Return x W^T + bias, plus up (down x) + up_bias in the rows from `first_adapted_row` on.

    x `[..., in]`, its leading dimensions counted as rows; W `[out, in]`. `up` and `up_bias` include
    the adapter's scale.
    """
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or not (most := most_rows(x.dtype))
        or x.numel() > most * weight.shape[1]
        or x.dtype != weight.dtype
        or not weight.is_cpu
        or type(weight) not in PLAIN
        or weight.stride(1) != 1
    ):
        return _composed(x, weight, bias, low_rank, first_adapted_row)
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    down, up, up_bias = low_rank or (None, None, None)
    cpu.linear(x, weight, bias, down, up, up_bias, first_adapted_row, out)
    return out


def _composed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_rank: LowRank | None,
    first_adapted_row: int,
) -> Tensor:
    out = product(x, weight, bias)
    if low_rank is not None:
        rows = torch.atleast_2d(x).flatten(0, -2)
        add_low_rank(out.view(len(rows), weight.shape[0]), rows, low_rank, first_adapted_row)
    return out


def add_low_rank(out: Tensor, x: Tensor, low_rank: LowRank, first_adapted_row: int) -> Tensor:
    """Add up (down x) + up_bias in place to `out[first_adapted_row:]`, and return `out`."""
    down, up, up_bias = low_rank
    low = product(x[first_adapted_row:].to(down.dtype), down)
    out[first_adapted_row:] += product(low, up, up_bias)
    return out


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias, computed in float32 where that takes less time, and rounded once."""
    few = x.numel() < FEW * weight.shape[1]
    if few or not is_slow(x) or type(weight) not in PLAIN or weight.dtype != x.dtype:
        return nn.functional.linear(x, weight, bias)
    wide, outputs = x.float(), max(1, PIECE // max(1, weight.shape[1]))
    parts = [nn.functional.linear(wide, piece.float()) for piece in weight.split(outputs)]
    out = torch.cat(parts, -1)
    return (out if bias is None else out.add_(bias)).to(x.dtype)


def is_slow(x: Tensor) -> bool:
    """Whether float32 multiplies these matrices sooner: bfloat16 where the processor has AVX2 only.

    PyTorch has no fast product of bfloat16 for it. Gradients and traces keep PyTorch's own.
    """
    return (
        x.dtype == torch.bfloat16
        and x.is_cpu
        and torch.backends.cpu.get_cpu_capability() == "AVX2"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


class Linear(nn.Linear):
    """`nn.Linear` computed by `linear`."""

    def parts(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias, past the slow attribute lookup of `nn.Module`."""
        return self._parameters["weight"], self._parameters["bias"]  # type: ignore

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, *self.parts())
