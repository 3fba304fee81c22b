"""Gated feed-forward layers, whose activations stay in the cache while they are multiplied."""

import functools

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

PIECE = 1 << 17  # elements of the gate that are multiplied at once


def multiply_in_pieces(module: nn.Module) -> None:
    """Let a module multiply in pieces if its forward has the instructions of Llama's."""
    if _code(type(module)) == _code(LlamaMLP):
        module.__class__ = _in_pieces(type(module))  # type: ignore


def _code(cls: type[nn.Module]) -> tuple:
    code = getattr(cls.forward, "__code__", None)
    return (code and (code.co_code, code.co_names, code.co_consts),)


@functools.cache
def _in_pieces(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if not x.is_cpu or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return cls.forward(self, x)
        gate, up = self.gate_proj(x), self.up_proj(x)  # type: ignore[operator]
        rows = max(1, PIECE // gate.shape[-1])
        pieces = (y.flatten(0, -2).split(rows) for y in (gate, up))
        for g, u in zip(*pieces, strict=True):
            torch.mul(self.act_fn(g), u, out=u)  # type: ignore[operator]
        return self.down_proj(up)  # type: ignore[operator]

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
