"""Reads the rotary embedding of a decoder, and which layers turn queries and keys by it."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from svd_engine.model.step.parts import NotDescribed
from svd_engine.model.step.plan import Rotary

Angles = Callable[[Tensor], tuple[Tensor, Tensor]]  # positions to cos and sin [positions, dim]
STATIC = ("default", "linear", "llama3", "yarn")  # a position's angles depend on it alone


def angles(decoder: Any) -> list[Angles]:
    """Return the angles of each kind of layer. Raise NotDescribed where they are not static."""
    module = getattr(decoder, "rotary_emb", None)
    if module is None:
        raise NotDescribed("it has no rotary_emb")
    types = getattr(module, "rope_type", "default")
    for kind in types.values() if isinstance(types, dict) else [types]:
        if kind not in STATIC:
            raise NotDescribed(f"its rotary embedding is {kind}")
    like = next(decoder.parameters())

    def of(*layer_type: str) -> Angles:
        @torch.inference_mode()
        def compute(positions: Tensor) -> tuple[Tensor, Tensor]:
            x = torch.zeros(1, dtype=like.dtype, device=like.device)
            cos, sin = module(x, positions[None].to(like.device), *layer_type)
            return cos[0].contiguous(), sin[0].contiguous()

        return compute

    if "layer_type" not in inspect.signature(type(module).forward).parameters:
        return [of()]
    return list(map(of, sorted(set(decoder.config.layer_types))))


def table(compute: Angles) -> Rotary:
    return lambda positions: compute(torch.arange(positions))


def which(candidates: Sequence[Angles], query: Tensor, key: Tensor, far: int) -> int | None:
    """Return by which angles a layer turns queries and keys; None if it does not turn them.

    query, key: `[rows, heads, 1, dim]`; rows 0 and 1 are of one token, alone, at positions 0 and
    `far`. Raise NotDescribed where positions do anything else to them.
    """
    if all(torch.equal(x[0], x[1]) for x in (query, key)):
        return None
    for index, compute in enumerate(candidates):
        cos, sin = (x.float() for x in compute(torch.tensor([0, far])))
        if all(_close(_turned(x[0].float(), cos, sin), x[1].float()) for x in (query, key)):
            return index
    raise NotDescribed("its positions are not a plain rotary embedding of halves")


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn what position 0 left as it was, but for a scale of the cosine."""
    dim = cos.shape[1]
    low, high = (x[..., :dim] / cos[0]).chunk(2, dim=-1)
    turned = torch.cat([low, high], -1) * cos[1] + torch.cat([-high, low], -1) * sin[1]
    return torch.cat([turned, x[..., dim:]], -1)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 0.02 * b.norm())
