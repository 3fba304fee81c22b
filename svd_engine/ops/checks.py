"""Checks of the operators' arguments: an error names the argument, its value and a remedy."""

from typing import Any

import torch
from torch import Tensor

from svd_engine.kernels.arguments import INF, Draw, Mask, PerRow, named
from svd_engine.kernels.reference import DIRECTIONS, Strength

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL_DTYPES = (*DTYPES, torch.float64)  # of the reference
LARGEST = torch.finfo(torch.float32).max  # kernels take every number as float32


def rows(adapted: Tensor, base: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """Check two `[N, V]` tensors of logits on one device."""
    if (
        type(adapted) is type(base) is Tensor
        and (shape := adapted.shape) == base.shape
        and len(shape) == 2
        and shape[1]
        and adapted.dtype in dtypes
        and base.dtype in dtypes
        and adapted.device == base.device
    ):
        return  # good, which is all that most calls need to know
    for name, x in (("adapted", adapted), ("base", base)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor of logits [N, V]; got {type(x).__name__}.")
        if x.ndim != 2 or x.shape[1] == 0:
            raise ValueError(
                f"{name} must have shape [N, V] with V >= 1; got {list(x.shape)}. "
                "Reshape to one row a position."
            )
        if x.dtype not in dtypes:
            raise ValueError(
                f"{name} must be one of {', '.join(map(str, dtypes))}; got {x.dtype}. "
                "backend='reference' also takes torch.float64."
            )
    if adapted.shape != base.shape:
        raise ValueError(
            f"adapted and base must have one shape; got {list(adapted.shape)} and "
            f"{list(base.shape)}. Cut a padded vocabulary with [:, :V]."
        )
    if adapted.device != base.device:
        raise ValueError(
            f"adapted and base must be on one device; got {adapted.device} and {base.device}."
        )


def mask(strength: Strength, alpha: float, penalty: float, direction: str, like: Tensor) -> Mask:
    """Pack how the rows of `like` are steered."""
    plain = type(strength) is float and -LARGEST <= strength <= LARGEST
    by = (strength, None) if plain else per_row("strength", strength, like, torch.float32)
    support(alpha, penalty)
    if direction != "projected":
        check_direction(direction)
    return named(Mask, (by, alpha, penalty, direction))


def check_direction(value: object) -> None:
    if value not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}; got {value!r}.")


def draw(
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int | Tensor,
    position: int | Tensor,
    like: Tensor,
) -> Draw:
    """Pack how a token of each row of `like` is drawn."""
    sampling(temperature, top_k, top_p, min_p)
    seeds = per_row("seed", seed, like, torch.int64)
    positions = per_row("position", position, like, torch.int64)
    return named(Draw, (temperature, top_k, top_p, min_p, seeds, positions))


def support(alpha: float, penalty: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1]; got {alpha}. alpha=0 keeps every token.")
    if not (-LARGEST <= penalty <= 0 or penalty == -INF):
        raise ValueError(
            "penalty must be <= 0, and in float32: at least -3.4e38, or -inf, which removes the "
            f"token; got {penalty}."
        )


def sampling(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    if not 0 <= temperature <= LARGEST:
        raise ValueError(
            f"temperature must be >= 0 and at most 3.4e38 (0 is greedy); got {temperature}."
        )
    if top_k < 0:
        raise ValueError(f"top_k must be >= 0 (0 keeps every token); got {top_k}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1]; got {top_p}.")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p must lie in [0, 1]; got {min_p}.")


def per_row(name: str, value: float | Tensor, like: Tensor, dtype: torch.dtype) -> PerRow[Any]:
    """Pack a finite number, or a tensor as contiguous `[N]` of `dtype`."""
    if type(value) is int and -(2**63) <= value < 2**63:
        return value, None
    if not isinstance(value, Tensor):
        if dtype == torch.float32:
            number(name, value)
        elif not (-(2**63) <= value < 2**63 and value == int(value)):
            raise ValueError(f"{name} must be an integer of 64 bits; got {value}.")
        return value, None
    if value.shape not in ((), like.shape[:1]):
        raise ValueError(
            f"{name} must be a number or have shape [N] = {list(like.shape[:1])}; "
            f"got {list(value.shape)}."
        )
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, as the logits are; got {value.device}.")
    if dtype == torch.int64 and (value.is_floating_point() or value.is_complex()):
        raise ValueError(f"{name} must be an integer tensor; got {value.dtype}.")
    each = value.to(dtype)
    # Reading a device tensor would wait for the device; there a NaN gives a NaN row instead.
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        if not each.isfinite().all():
            raise not_finite(name, value.tolist())
    return 0, each.expand(like.shape[0]).contiguous()


def number(name: str, value: float) -> None:
    """Check that float32 holds a number."""
    if not -LARGEST <= value <= LARGEST:
        raise not_finite(name, value)


def not_finite(name: str, value: object) -> ValueError:
    return ValueError(f"{name} must be finite, and in float32: at most 3.4e38; got {value}.")


def k(k: int, vocab: int) -> None:
    if not 1 <= k <= vocab:
        raise ValueError(f"k must lie in [1, V = {vocab}]; got {k}.")


def capacity(value: int) -> None:
    if not value >= 1:
        raise ValueError(f"capacity must be >= 1, the slots for a row's support; got {value}.")


def target(target: Tensor, like: Tensor, vocab: int) -> None:
    """Check int64 `[N]` token ids below V, for the N rows of `like`."""
    if target.shape != like.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"target must be int64 of shape [N] = {list(like.shape[:1])}; "
            f"got {target.dtype} of {list(target.shape)}."
        )
    if target.device != like.device:
        raise ValueError(
            f"target must be on {like.device}, as the logits are; got {target.device}."
        )
    if target.device.type == "cpu" and not torch.compiler.is_compiling() and len(target):
        low, high = target.min().item(), target.max().item()
        if low < 0 or high >= vocab:
            raise ValueError(
                f"target must hold token ids in [0, V = {vocab}); got {low} to {high}."
            )


def out(out: Tensor, adapted: Tensor, base: Tensor) -> None:
    """Check where the result goes: to memory of its own, or exactly to that of an operand."""
    like = adapted
    if out.shape != like.shape or out.dtype not in DTYPES or out.device != like.device:
        raise ValueError(
            f"out must be a float tensor of shape {list(like.shape)} on {like.device}; "
            f"got {out.dtype} of {list(out.shape)} on {out.device}."
        )
    if out.stride(-1) != 1 or (out.shape[0] > 1 and out.stride(0) < out.shape[1]):
        raise ValueError(
            f"out must have strides [>= V, 1]; got {list(out.stride())}. Pass a contiguous tensor."
        )
    if torch.compiler.is_compiling():
        return  # `out` is copied to afterwards
    for name, rows in (("adapted", adapted), ("base", base)):
        same = out.data_ptr() == rows.data_ptr() and out.dtype == rows.dtype
        if not (same and out.stride() == rows.stride()) and overlap(out, rows):
            raise ValueError(
                f"out must be {name} itself or share no memory with it; it overlaps {name} in "
                "part. Pass another tensor."
            )


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two `[N, V]` tensors with last stride 1 have a byte in common."""
    if a.numel() == 0 or a.device != b.device:
        return False
    (a_start, a_step, a_width), (b_start, b_step, b_width) = map(_rows_in_bytes, (a, b))
    last = len(a) - 1
    if a_start + last * a_step + a_width <= b_start or b_start + last * b_step + b_width <= a_start:
        return False
    # Where rows are apart, those of b that reach the start of a's row i, or begin within it.
    for start in range(a_start, a_start + last * a_step + 1, a_step or 1):
        if b_step == 0:
            if b_start < start + a_width and start < b_start + b_width:
                return True
            continue
        first = max(0, (start - b_width - b_start) // b_step + 1)
        if first <= last and b_start + first * b_step < start + a_width:
            return True
    return False


def _rows_in_bytes(x: Tensor) -> tuple[int, int, int]:
    """Address of the first row, bytes from one to the next, bytes of each."""
    return x.data_ptr(), x.stride(0) * x.itemsize, x.shape[1] * x.itemsize
