"""Adapted layers of the module trees, for every row or for the second half of the rows.

They share the weights of the base model; what belongs to the adapter is a copy.
"""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from svd_engine.model.layers import linear


class AdaptedLayer(nn.Module):
    """A base layer and the adapter's change to all rows, or to the second half if `paired`."""

    base_layer: nn.Module
    paired = False

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    @property
    def weight(self) -> Any:
        """The base layer's, of which some models ask for the dtype."""
        return self.base_layer.weight

    def first_adapted_row(self, x: Tensor) -> int:
        return x.shape[0] // 2 if self.paired else 0


class AdaptedLinear(AdaptedLayer):
    """W x, and for the adapted rows g * (W (l * x) + B A (l * x)); each of l, A and B, g may lack.

    LoRA has A `[r, in]` and B `[out, r]`, the latter with its scale; IA3 has l `[in]` or g `[out]`;
    DoRA has A, B and g.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        low_rank: linear.LowRank | None = None,
        input_scale: Tensor | None = None,
        output_scale: Tensor | None = None,
    ) -> None:
        super().__init__(base_layer)
        self.low_rank = low_rank
        self.input_scale, self.output_scale = input_scale, output_scale

    def forward(self, x: Tensor) -> Tensor:
        base, first_row = self._modules["base_layer"], self.first_adapted_row(x)
        assert base is not None
        if self.input_scale is not None:
            x = x.clone()  # other layers may read the same x
            x[first_row:] *= self.input_scale
        if type(base) is linear.Linear and not base._forward_hooks and not base._forward_pre_hooks:
            flat_row = first_row * (x.numel() // (x.shape[0] * x.shape[-1]))
            out = linear.linear(x, *base.parts(), self.low_rank, flat_row)
        else:
            out = base(x)
            if self.low_rank is not None:
                linear.add_low_rank(out, x, self.low_rank, first_row)
        if self.output_scale is not None:
            out[first_row:] *= self.output_scale
        return out


class AdaptedEmbedding(AdaptedLayer):
    """W[x], and for the adapted rows g * (W[x] + B A[x]), without g where it is None."""

    def __init__(
        self, base_layer: nn.Module, down: Tensor, up: Tensor, output_scale: Tensor | None = None
    ) -> None:
        super().__init__(base_layer)
        self.down, self.up = down, up  # A [tokens, r], B [out, r] with its scale
        self.output_scale = output_scale

    def forward(self, x: Tensor) -> Tensor:
        out, adapted = self.base_layer(x), slice(self.first_adapted_row(x), None)
        low = nn.functional.embedding(x[adapted], self.down)
        out[adapted] += nn.functional.linear(low, self.up)
        if self.output_scale is not None:
            out[adapted] *= self.output_scale
        return out


class Halves(nn.Module):
    """A module of the base for the first half of the rows, and one in its place for the second.

    It pairs whatever computes each row by itself, and reads the weights of the two once each.
    """

    def __init__(self, base: nn.Module, adapted: nn.Module) -> None:
        super().__init__()
        self.base, self.adapted = base, adapted

    @property
    def weight(self) -> Any:
        return self.base.weight

    def forward(self, x: Tensor) -> Any:
        base, adapted = (module(y) for module, y in zip(self.children(), x.chunk(2), strict=True))
        if isinstance(base, tuple):  # of a router
            return tuple(map(torch.cat, zip(base, adapted, strict=True)))
        return torch.cat([base, adapted])


def goes_row_by_row(module: nn.Module) -> bool:
    """Whether a module is a single layer of one input, which `Halves` may split."""
    inputs = list(inspect.signature(type(module).forward).parameters)[1:]
    return len(inputs) == 1 and not any(module.children())


def for_second_half(base: nn.Module, adapted: nn.Module) -> nn.Module:
    """Return the module for a batch of both models, of those for all rows of either."""
    if adapted is base:
        return base
    if isinstance(adapted, AdaptedLayer):
        paired = copy.copy(adapted)
        paired.paired = True
        return paired
    return Halves(base, adapted)
