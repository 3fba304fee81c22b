"""Attention for both halves of a pair, registered with transformers under the name `svd_engine`."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from svd_engine.model.layers import linear
from svd_engine.ops import cpu
from svd_engine.ops.head import softcapped

NAME = "svd_engine"
BLOCK = 128  # queries of a prompt that a CPU computes at once
# What models hand to any attention and what changes nothing in evaluation over a cache.
WITHOUT_EFFECT = frozenset(
    {"dropout", "use_cache", "cache_position", "output_attentions", "output_hidden_states"}
)


class Call(NamedTuple):
    """What a layer hands to attention besides values."""

    query: Tensor
    key: Tensor
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    window: int | None
    softcap: float | None
    is_plain: bool  # values as wide as keys, and no further argument


_recording: ContextVar[list[Call] | None] = ContextVar("recording", default=None)


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Yield a list to which every layer that calls attention adds its call."""
    calls: list[Call] = []
    token = _recording.set(calls)
    try:
        yield calls
    finally:
        _recording.reset(token)


_causal: ContextVar[Tensor | None] = ContextVar("causal", default=None)


@contextmanager
def causal(mask: Tensor | None) -> Iterator[None]:
    """Let attention know that `mask` hides from token i of every row all but slots 0 to i.

    Attention that is handed this very tensor may leave out what it hides.
    """
    token = _causal.set(mask)
    try:
        yield
    finally:
        _causal.reset(token)


def _has_causal_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a kernel needs no mask and leaves out what it would hide, in memory and time."""
    if not query.is_cuda:
        return False
    cuda = torch.backends.cuda
    asked = cuda.SDPAParams(query, key, value, None, 0.0, True, True)
    return cuda.can_use_flash_attention(asked)


def causal_mask(positions: Tensor, kv_length: int, dtype: torch.dtype) -> Tensor:
    """Build the additive causal mask `[rows, 1, q, kv_length]`: 0 where visible, -inf where hidden.

    positions: `[rows, q]`, of the query tokens. Slot j of a row holds its position j.
    """
    slots = torch.arange(kv_length, device=positions.device)
    return _hide((slots > positions[:, :, None])[:, None], dtype)


def _hide(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Build an additive mask; attention would convert a bool one in every layer."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
        hidden, -torch.inf
    )


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_ids: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Return softmax(query key^T * scaling) value over visible slots, `[rows, q, heads, out]`.

    Query heads that share a key head become extra query positions of it, so keys and values are
    never repeated. A mask of None hides nothing. s_aux: a learned sink per head, `[heads]`: one
    more score, which takes weight and has no value. Raise ValueError for an argument that is
    neither known nor None.
    """
    if not kwargs.keys() <= WITHOUT_EFFECT:
        _refuse_unknown(module, kwargs)
    rows, heads, length, dim = query.shape
    mask = attention_mask
    if sliding_window is not None and key.shape[2] > sliding_window:
        assert position_ids is not None
        slots = torch.arange(key.shape[2], device=key.device)
        outside = slots <= position_ids[:, None, :, None] - sliding_window
        window = _hide(outside, query.dtype)
        mask = window if mask is None else mask + window
    scaling = dim**-0.5 if scaling is None else scaling
    if (recording := _recording.get()) is not None:
        has_plain_values = value.shape[3] == dim and s_aux is None
        sizes = heads, key.shape[1], dim
        recording.append(
            Call(query, key, *sizes, scaling, sliding_window, softcap, has_plain_values)
        )
    if length == 1 and s_aux is None and _can_run_natively(query, key, value):
        out = query.new_empty(rows, 1, heads, value.shape[3])
        cpu.attend(query, key, value, mask, scaling, softcap, out)
        return out, None
    is_causal = attention_mask is not None and attention_mask is _causal.get()
    is_alone = mask is attention_mask and softcap is None and s_aux is None  # nothing else counts
    if is_causal and is_alone and _has_causal_kernel(query, key, value):
        out = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None
    if not is_causal or not query.is_cpu or length <= BLOCK:
        return _composed(query, key, value, mask, scaling, softcap, s_aux), None
    assert mask is not None
    blocks = []
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        seen = key[:, :, :end], value[:, :, :end], mask[:, :, start:end, :end]
        blocks.append(_composed(query[:, :, start:end], *seen, scaling, softcap, s_aux))
    return torch.cat(blocks, 1), None


def _composed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    rows, heads, length, dim = query.shape
    group = heads // key.shape[1]
    if mask is not None and length > 1:
        mask = mask.repeat(1, 1, group, 1)
    packed = query.reshape(rows, key.shape[1], group * length, dim)
    if softcap is None and s_aux is None:
        out = scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    else:
        weights = packed @ key.transpose(-1, -2) * scaling
        weights = softcapped(weights, softcap)
        if mask is not None:
            weights = weights + mask
        if s_aux is not None:
            sinks = s_aux.view(1, -1, group, 1).expand(rows, -1, -1, length).flatten(2)
            weights = torch.cat([weights, sinks[..., None].to(weights.dtype)], -1)
        weights = weights.softmax(-1, dtype=torch.float32).to(value.dtype)
        out = weights[..., : key.shape[2]] @ value
    # On a GPU the kernels of SDPA return other strides than the query's.
    return out.reshape(rows, heads, length, value.shape[3]).transpose(1, 2).contiguous()


def _refuse_unknown(module: torch.nn.Module, arguments: dict[str, Any]) -> None:
    unknown = {name for name in arguments if arguments[name] is not None} - WITHOUT_EFFECT
    if unknown:
        raise ValueError(
            f"{type(module).__name__} hands {', '.join(sorted(unknown))} to attention, which is "
            "not supported."
        )


def _can_run_natively(*tensors: Tensor) -> bool:
    return linear.can_run_natively(*tensors) and all(x.stride(3) == 1 for x in tensors)


AttentionInterface.register(NAME, attend)
