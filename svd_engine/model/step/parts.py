"""Reads the parts of a plan from single modules: linear layers, norms, the activation."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from svd_engine.model.adapter_layers import AdaptedLayer, AdaptedLinear, Halves
from svd_engine.model.layers import linear as linear_layers
from svd_engine.model.layers.quantised import QuantisedLinear
from svd_engine.model.step import rms_norm
from svd_engine.model.step.plan import Linear, Norm

PLACES = "attention_norm", "attended_norm", "feedforward_norm", "fed_norm"
NORMS = (  # of a layer, by the names of the modules in these places
    ("input_layernorm", None, "post_attention_layernorm", None),  # Llama
    (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),  # Gemma 2
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),  # OLMo 2
    ("input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2"),  # HyperCLOVA X
    ("input_layernorm", None, "pre_feedforward_layernorm", None),  # VaultGemma
)  # fmt: skip
LAYER_NORMS = {name for names in NORMS for name in names if name}
ACTIVATIONS = {
    "silu": nn.functional.silu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}


class NotDescribed(Exception):  # noqa: N818
    """Why a decoder has no plan."""


def linear(module: Any) -> Linear:
    """Read a linear layer and its adapter."""
    if isinstance(module, Halves):
        raise NotDescribed("the halves have linear layers of their own")
    base: Any = module.base_layer if isinstance(module, AdaptedLayer) else module
    bias = getattr(base, "bias", None)
    is_codes = type(base) is QuantisedLinear
    weight: Any = base.codes if is_codes else getattr(base, "weight", None)
    if not is_codes and (
        type(base) not in (nn.Linear, linear_layers.Linear)
        or type(weight) not in linear_layers.PLAIN
        or weight.stride(1) != 1
    ):
        raise NotDescribed("it has linear layers of another kind")
    plain = Linear(weight.detach(), None if bias is None else bias.detach())
    if is_codes:
        plain = replace(plain, fan_in=base.in_features, bits=base.bits)
    if module is base:
        return plain
    if isinstance(module, AdaptedLinear):
        return replace(
            plain, low_rank=module.low_rank, input_scale=module.input_scale,
            output_scale=module.output_scale,
        )  # fmt: skip
    raise NotDescribed(f"it has a {type(module).__name__}")


def joined(
    module: Any, names: Sequence[str], joint: str, sizes: Sequence[int] | None
) -> list[Linear]:
    """Read the linear layers of these names, or the parts of the one that joins them."""
    if not hasattr(module, joint):
        if missing := [name for name in names if not hasattr(module, name)]:
            raise NotDescribed(f"it has no {', '.join(missing)}")
        return [linear(getattr(module, name)) for name in names]
    whole = linear(getattr(module, joint))
    if whole.input_scale is not None:
        raise NotDescribed(f"the input of {joint} is scaled")
    sizes = sizes or [len(whole.weight) // len(names)] * len(names)

    def part(start: int, size: int) -> Linear:
        def rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[start : start + size]

        low_rank = whole.low_rank
        if low_rank is not None:
            down, up, up_bias = low_rank
            low_rank = down, up[start : start + size], rows(up_bias)
        return replace(
            whole, weight=whole.weight[start : start + size], bias=rows(whole.bias),
            low_rank=low_rank, output_scale=rows(whole.output_scale),
        )  # fmt: skip

    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [part(start, size) for start, size in zip(starts, sizes, strict=True)]


def norm(module: Any) -> Any:
    """Read an RMSNorm; None where there is none."""
    if module is None or isinstance(module, nn.Identity):
        return None
    found = rms_norm.recognise(module)
    if found is None:
        raise NotDescribed("its norms are no RMSNorm of a known form")
    return Norm(module.weight.detach(), *found)


def layer_norms(layer: Any) -> dict[str, Norm | None]:
    """Read the norms of a layer around attention and feed-forward, by their places in the plan."""
    held = {name for name in LAYER_NORMS if isinstance(getattr(layer, name, None), nn.Module)}
    for names in NORMS:
        if held == {name for name in names if name}:
            modules = [name and getattr(layer, name) for name in names]
            return dict(zip(PLACES, map(norm, modules), strict=True))
    raise NotDescribed(f"its layer holds {', '.join(sorted(held)) or 'no norms'}")


def activation(module: Any) -> str:
    """Return the name of a feed-forward's activation, found by trying it."""
    act = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
    x = torch.linspace(-6, 6, 97)
    for name, function in ACTIVATIONS.items():
        if act is not None and torch.allclose(act(x), function(x), atol=1e-6):
            return name
    raise NotDescribed("its activation is neither SiLU nor GELU with tanh")
