"""Adapted layers reduced to their arithmetic, for every row or for the second half of the rows.

They hold copies of the adapter's weights and share those of the base model.

PEFT's lora_A and lora_B are called `down` `[r, in]` and `up` `[out, r]` here.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.ia3 import Linear as Ia3Linear
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper as LoraParameter
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from svd_engine.model.layers import linear


class AdaptedLayer(nn.Module):
    """A base layer and the adapter's change to all rows, or to the second half if `paired`."""

    base_layer: nn.Module
    paired = False

    def __init__(self, layer: BaseTunerLayer) -> None:
        super().__init__()
        self.base_layer = layer.get_base_layer()

    def first_adapted_row(self, x: Tensor) -> int:
        return x.shape[0] // 2 if self.paired else 0


class PairedLoraLinear(AdaptedLayer):
    """W x, plus scale * B (A x) for the adapted rows."""

    low_rank: linear.LowRank  # A [r, in], scale * B [out, r] and its bias

    def __init__(self, layer: LoraLinear, adapter: str) -> None:
        super().__init__(layer)
        up: nn.Linear = layer.lora_B[adapter]  # type: ignore[assignment]
        scale = layer.scaling[adapter]
        down: Tensor = layer.lora_A[adapter].weight  # type: ignore[assignment]
        up_bias = None if up.bias is None else up.bias.detach() * scale
        # Matrices tied to those of an embedding are transposed views.
        scaled = (up.weight.detach() * scale).contiguous()
        self.low_rank = (_copy(down), scaled, up_bias)

    def forward(self, x: Tensor) -> Tensor:
        base, first_row = self._modules["base_layer"], self.first_adapted_row(x)
        assert base is not None
        if type(base) is linear.Linear and not base._forward_hooks and not base._forward_pre_hooks:
            flat_row = first_row * (x.numel() // (x.shape[0] * x.shape[-1]))
            return linear.few_rows_linear(x, *base.parts(), self.low_rank, flat_row)
        return linear.add_low_rank(base(x), x, self.low_rank, first_row)


class PairedLoraEmbedding(AdaptedLayer):
    """W[x], plus scale * B A[x] for the adapted rows."""

    down: Tensor  # A, [tokens, r]
    up: Tensor  # scale * B, [out, r]

    def __init__(self, layer: LoraEmbedding, adapter: str) -> None:
        super().__init__(layer)
        scale = getattr(self.base_layer, "embed_scale", 1.0)  # Gemma scales both terms
        self.down = _copy(layer.lora_embedding_A[adapter].T)
        self.up = layer.lora_embedding_B[adapter].detach() * layer.scaling[adapter] * scale

    def forward(self, x: Tensor) -> Tensor:
        out, adapted = self.base_layer(x), slice(self.first_adapted_row(x), None)
        low = nn.functional.embedding(x[adapted], self.down)
        out[adapted] += nn.functional.linear(low, self.up)
        return out


class PairedIa3(AdaptedLayer):
    """l * W x for the adapted rows, or W (l * x) in a feed-forward layer."""

    scale: Tensor  # l, [out] or [in]

    def __init__(self, layer: Ia3Linear, adapter: str) -> None:
        super().__init__(layer)
        self.scale = _copy(layer.ia3_l[adapter].flatten())
        self.is_feedforward = layer.is_feedforward

    def forward(self, x: Tensor) -> Tensor:
        adapted = slice(self.first_adapted_row(x), None)
        if self.is_feedforward:
            x = x.clone()  # other layers may read the same x
            x[adapted] *= self.scale
            return self.base_layer(x)
        out = self.base_layer(x)
        out[adapted] *= self.scale
        return out


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().clone(memory_format=torch.contiguous_format)


def why_not(layer: BaseTunerLayer) -> str | None:
    """Return why an adapted layer has no paired form, or None where it has one."""
    if isinstance(layer, LoraParameter):
        return f"adapts {layer.parameter_name} itself"
    if not isinstance(layer, LoraLinear | LoraEmbedding | Ia3Linear):
        return f"is an adapted {type(layer.get_base_layer()).__name__}"
    if variants := getattr(layer, "lora_variant", None):
        return f"uses {type(next(iter(variants.values()))).__name__}"
    return None


def for_second_half(layer: nn.Module) -> nn.Module:
    """Return the same reduced layer for a batch of both models."""
    paired = copy.copy(layer)
    if isinstance(paired, AdaptedLayer):
        paired.paired = True
    return paired


def reduced(layer: BaseTunerLayer, adapter: str) -> nn.Module:
    """Build a layer's reduced form, or return its base layer if `adapter` does not change it."""
    if isinstance(layer, LoraLinear) and adapter in layer.lora_A:
        return PairedLoraLinear(layer, adapter)
    if isinstance(layer, LoraEmbedding) and adapter in layer.lora_embedding_A:
        return PairedLoraEmbedding(layer, adapter)
    if isinstance(layer, Ia3Linear) and adapter in layer.ia3_l:
        return PairedIa3(layer, adapter)
    return layer.get_base_layer()


def copies(
    layers: Sequence[BaseTunerLayer], wrappers: Sequence[AuxiliaryTrainingWrapper]
) -> dict[Any, nn.Module]:
    """Copy PEFT's own modules as they are, over the modules of the base model under them."""
    own: list[Any] = [*layers, *wrappers]
    under = [x.get_base_layer() for x in layers] + [x.original_module for x in wrappers]
    return dict(zip(own, copy.deepcopy(own, {id(x): x for x in under}), strict=True))
