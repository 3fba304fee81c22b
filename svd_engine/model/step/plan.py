"""The plan: what a decoder computes for a new token, as tensors and numbers without modules."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from svd_engine.model.layers.linear import LowRank
from svd_engine.model.step.rms_norm import Form

Rotary = Callable[[int], tuple[Tensor, Tensor]]  # cos and sin [positions, rotary_dim]


@dataclass(frozen=True)
class Linear:
    """W x + bias, and for adapted rows (W y + bias + up (down y) + up_bias) * output_scale.

    There y = x * input_scale. What is None is left out.
    """

    weight: Tensor  # [out, in], or uint8 codes [out, bytes]
    bias: Tensor | None = None
    low_rank: LowRank | None = None
    input_scale: Tensor | None = None  # [in]
    output_scale: Tensor | None = None  # [out]
    fan_in: int = 0  # of codes
    bits: int = 0  # of a code; 0 where the weight is no codes


@dataclass(frozen=True)
class Norm:
    """An RMSNorm over the last `len(weight)` elements."""

    weight: Tensor
    eps: float
    form: Form


@dataclass(frozen=True)
class Layer:
    """A decoder layer; a norm is None where the architecture has none there."""

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    gate: Linear
    up: Linear
    down: Linear
    attention_norm: Norm | None  # of attention's input
    query_norm: Norm | None  # per head, or over all heads
    key_norm: Norm | None
    attended_norm: Norm | None  # of attention's output, before the residual is added
    feedforward_norm: Norm | None
    fed_norm: Norm | None
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    rotary: int | None  # which of the plan's
    activation: str  # "silu" or "gelu_tanh"
    scaling: float
    softcap: float | None
    residual_scale: float


@dataclass(frozen=True)
class Plan:
    """A decoder from the embeddings of new tokens to hidden states, and its head if it is known."""

    layers: tuple[Layer, ...]
    norm: Norm
    head: Linear | None
    embedding_scale: float | Tensor | None
    rotaries: tuple[Rotary, ...]
