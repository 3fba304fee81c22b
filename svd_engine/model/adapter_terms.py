"""Layers that PEFT has adapted, reduced to the arithmetic of `adapter_layers` where they have it.

A layer is read by the method that made it, whatever its base layer is: PEFT has a class of its own
for each kind of quantised base. What is constant at inference is computed once: the norm of DoRA,
the matrices of VeRA.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from svd_engine.model.adapter_layers import AdaptedEmbedding, AdaptedLayer, AdaptedLinear
from svd_engine.model.layers.linear import PLAIN

Matrices = tuple[Tensor, Tensor]  # A [r, in], and B [out, r] with its scale
MERGED = 1e-5  # of the norm of outputs: rounding in a sum of weights
Reader = Callable[[Any, str], AdaptedLayer | Matrices | None]
# Variants that compute what LoRA computes, once they are trained.
LIKE_LORA = {
    "MiCALinearVariant", "MiCAEmbeddingVariant", "MontecloraLinearVariant", "VeloraLinearVariant",
}  # fmt: skip
DORA = {"DoraLinearVariant", "DoraEmbeddingVariant"}
OTHER_SHAPES = {"ParamWrapper", "MultiheadAttention", "LoraParallelLinear"}  # with A and B of LoRA


@torch.no_grad()
def reduced(layer: BaseTunerLayer, adapter: str) -> nn.Module | None:
    """Build a layer's reduced form, or return its base layer if `adapter` does not change it.

    Return None where the arithmetic is another.
    """
    if (read := reader(layer)) is None:
        return None
    base = layer.get_base_layer()
    if adapter not in getattr(layer, HOLDERS.get(read, "r")):
        return base
    found = read(layer, adapter)
    if isinstance(found, tuple):
        down, up = map(_copy, found)
        return AdaptedLinear(base, (down, up, None))
    return found


@torch.no_grad()
def merged(put: Any, adapter: str) -> nn.Module | None:
    """Build a plain layer with the weights of an adapted one; None where that is not exact.

    PEFT's own form of many methods makes its matrix anew in each pass. In float32 the sum of the
    two loses nothing that counts.
    """
    if not isinstance(put, BaseTunerLayer) or isinstance(put, TrainableTokensLayer):
        return None
    base = put.get_base_layer()
    weight: Any = getattr(base, "weight", None)
    if (
        type(base) not in (nn.Linear, Conv1D)
        or type(weight) not in PLAIN
        or weight.dtype != torch.float32
    ):
        return None
    own = copy.copy(base)
    own._parameters = {k: x if x is None else _parameter(x) for k, x in base._parameters.items()}
    layer: Any = copy.deepcopy(put, {id(base): own})
    layer.eval()
    generator = torch.Generator().manual_seed(0)
    inputs = weight.shape[0 if type(base) is Conv1D else 1]
    x = torch.randn(2, inputs, generator=generator).to(weight)
    want = layer(x)
    try:
        layer.merge(adapter_names=[adapter])
    except (AttributeError, NotImplementedError, ValueError):
        return None
    plain = layer.get_base_layer()
    error = (plain(x) - want).norm() / want.norm()
    return plain if type(plain) is type(base) and error < MERGED else None


def _parameter(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x.detach().clone(), requires_grad=False)


def reader(put: Any) -> Reader | None:
    """Return the function that reads a module of PEFT's, if there is one."""
    if type(put).__name__ in OTHER_SHAPES or not isinstance(put, BaseTunerLayer):
        return None
    read = READERS.get(type(put).__module__.removeprefix("peft.tuners.").split(".")[0])
    is_linear = not isinstance(put.get_base_layer(), nn.Embedding | nn.modules.conv._ConvNd)
    return read if is_linear or read is _lora else None


def _lora(layer: Any, adapter: str) -> AdaptedLayer | None:
    base, scale = layer.get_base_layer(), layer.scaling[adapter]
    variant = type(getattr(layer, "lora_variant", {}).get(adapter)).__name__
    is_dora = variant in DORA
    if variant not in {"NoneType", *LIKE_LORA, *DORA}:
        return None
    if adapter in layer.lora_embedding_A:
        down, up = layer.lora_embedding_A[adapter].T, layer.lora_embedding_B[adapter]
        norm = _dora_scale(layer, adapter, down.T, up) if is_dora else None
        embed_scale = getattr(base, "embed_scale", 1.0)  # Gemma scales both terms
        return AdaptedEmbedding(base, _copy(down), up * scale * embed_scale, norm)
    linear: Any = layer.lora_B[adapter]
    if type(linear) is not nn.Linear or type(layer.lora_A[adapter]) is not nn.Linear:
        return None
    down, up = layer.lora_A[adapter].weight, linear.weight
    up_bias = None if linear.bias is None else linear.bias * scale
    norm = _dora_scale(layer, adapter, down, up) if is_dora else None
    if norm is not None and (bias := getattr(base, "bias", None)) is not None:
        if not norm.all():
            return None
        up_bias = bias.to(norm.dtype) / norm - bias  # so that the bias itself is not scaled
    # Matrices tied to those of an embedding are transposed views.
    return AdaptedLinear(base, (_copy(down), _copy(up * scale), up_bias), output_scale=norm)


def _dora_scale(layer: Any, adapter: str, down: Tensor, up: Tensor) -> Tensor:
    """Return the trained magnitude of each output over its norm."""
    dora, base = layer.lora_magnitude_vector[adapter], copy.copy(layer.get_base_layer())
    base._parameters = dict(base._parameters)  # PEFT puts a weight anew that it dequantises
    weight = dequantize_module_weight(base).to(down.dtype)
    norm = dora.get_weight_norm(weight, up @ down, layer.scaling[adapter])
    return (dora.weight / norm).flatten().contiguous()


def _ia3(layer: Any, adapter: str) -> AdaptedLayer:
    scale = _copy(layer.ia3_l[adapter].flatten())
    if layer.is_feedforward:
        return AdaptedLinear(layer.get_base_layer(), input_scale=scale)
    return AdaptedLinear(layer.get_base_layer(), output_scale=scale)


def _adalora(layer: Any, adapter: str) -> Matrices:
    scale = layer.scaling[adapter] / (layer.ranknum[adapter] + 1e-5)
    return layer.lora_A[adapter] * layer.lora_E[adapter], layer.lora_B[adapter] * scale


def _delora(layer: Any, adapter: str) -> Matrices:
    down, up = layer.delora_A[adapter], layer.delora_B[adapter]
    norms = down.norm(dim=1).clamp(min=1e-4) * up.norm(dim=0).clamp(min=1e-4)
    scale = layer.delora_lambda[adapter] / layer.r[adapter] / norms
    return down * layer.delora_w_norm[adapter], up * scale


def _miss(layer: Any, adapter: str) -> Matrices | None:
    if layer.miss_fn == "bat":
        return None
    up = layer.miss_block[adapter].T
    if layer.miss_fn == "mini":
        up = up.repeat(layer.out_features // layer.miss_mini_r[adapter], 1)
    rank = up.shape[1]  # A sums every r-th input
    sums = torch.eye(rank, dtype=up.dtype, device=up.device)
    return sums.repeat(1, -(-layer.in_features // rank))[:, : layer.in_features], up


def _tinylora(layer: Any, adapter: str) -> Matrices:
    return layer._compute_R(adapter) @ layer.tinylora_A[adapter], layer.tinylora_B[adapter]


def _pvera(layer: Any, adapter: str) -> Matrices:
    down, up = layer.pvera_A[adapter], layer.pvera_B[adapter][: layer.out_features]
    down = layer.pvera_lambda_d[adapter][:, None] * down[:, : layer.in_features]
    return down.chunk(2)[0], layer.pvera_lambda_b[adapter][:, None] * up  # the mean alone


def _vera(layer: Any, adapter: str) -> Matrices:
    down, up = layer.vera_A[adapter], layer.vera_B[adapter][: layer.out_features]
    down = layer.vera_lambda_d[adapter][:, None] * down[:, : layer.in_features]
    return down, layer.vera_lambda_b[adapter][:, None] * up


READERS: dict[str, Reader] = {
    "adalora": _adalora,
    "delora": _delora,
    "ia3": _ia3,
    "lora": _lora,
    "miss": _miss,
    "pvera": _pvera,
    "tinylora": _tinylora,
    "unilora": lambda layer, adapter: layer._get_lora_matrices(adapter),
    "vblora": lambda layer, adapter: layer._get_lora_matrices(adapter),
    "vera": _vera,
}
# What has an entry for each adapter of a layer; of other methods it is `r`.
HOLDERS: dict[Reader, str] = {_ia3: "ia3_l", _miss: "miss_r"}


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().clone(memory_format=torch.contiguous_format)
