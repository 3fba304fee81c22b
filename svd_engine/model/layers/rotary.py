"""Rotary embedding as native calls, in attention modules whose own function computes the same."""

import functools
import inspect
from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor, nn

from svd_engine.model.layers import linear
from svd_engine.ops import cpu

NAME = "apply_rotary_pos_emb"
RENAMES_ARGUMENTS = "transformers.utils.deprecation"  # its decorator only renames arguments
Rotary = Callable[..., tuple[Tensor, Tensor]]


def composed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x cos + [-x2, x1] sin for x = [x1, x2] in its last dimension, each product rounded."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], -1) * sin


@functools.cache
def recognised(rotary: Rotary) -> bool:
    """Whether `rotary` computes `composed` for queries and keys, found by trying it."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, cos, sin = normal(2, 4, 1, 8), normal(2, 2, 1, 8), normal(2, 1, 8), normal(2, 1, 8)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(dtype) for x in (q, k, cos, sin)]
        try:
            got = rotary(*inputs)
        except Exception:  # it has other parameters
            return False
        c, s = (x[:, None] for x in inputs[2:])
        if len(got) != 2 or not all(
            torch.equal(g, composed(x, c, s)) for g, x in zip(got, inputs[:2], strict=True)
        ):
            return False
    return True


def few_rows(rotary: Rotary) -> Rotary:
    """Wrap `rotary`: native where every sequence has one token."""

    @functools.wraps(rotary)
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args, **kwargs):
        if (
            args
            or kwargs
            or q.shape[2] != 1
            or cos.shape != (q.shape[0], 1, q.shape[3])
            or not linear.can_run_natively(q, k, cos, sin)
            or q.stride(3) != 1
            or k.stride(3) != 1
        ):
            return rotary(q, k, cos, sin, *args, **kwargs)
        cos, sin = cos[:, None], sin[:, None]
        out = torch.empty_like(q), torch.empty_like(k)
        cpu.rotate(q, cos, sin, out[0])
        cpu.rotate(k, cos, sin, out[1])
        return out

    return rotate


def use_native_forward(module: nn.Module) -> None:
    """Let an attention module whose rotary embedding is recognised call the native one."""
    if "forward" not in module.__dict__:
        # The class changes, for the reasons given in `rms_norm.use_native_forward`.
        module.__class__ = _with_native(type(module))  # type: ignore[arg-type]


@functools.cache
def _with_native(cls: type[nn.Module]) -> type[nn.Module]:
    forward = cls.forward
    if getattr(forward, "__globals__", {}).get("__name__") == RENAMES_ARGUMENTS:
        forward = inspect.unwrap(forward)  # our calls use the new names
    if not isinstance(forward, FunctionType) or NAME not in forward.__code__.co_names:
        return cls
    rotary = forward.__globals__.get(NAME)
    if rotary is None or not recognised(rotary):
        return cls
    # `forward` looks `apply_rotary_pos_emb` up in the globals of its modeling file. Replacing it
    # there would change every model in the process, so the same code gets a copy of the globals
    # with that one name replaced; a later patch of the modeling file does not reach the copy. That
    # is sound because `recognised` has compared the function bit for bit. transformers' own hook
    # (`use_kernelized_func`) also needs the package `kernels` and maps by name, see `rms_norm`.
    native_forward = FunctionType(
        forward.__code__,
        {**forward.__globals__, NAME: few_rows(rotary)},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    native_forward.__kwdefaults__ = forward.__kwdefaults__
    return type(cls.__name__, (cls,), {"forward": native_forward, "__module__": cls.__module__})
