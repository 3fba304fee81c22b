"""Recognises RMSNorms of a known form, by trying them."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Form(NamedTuple):
    """How an architecture's RMSNorm differs from others."""

    offset: float  # added to the weight
    rounded_between: bool  # x / rms is rounded to the dtype before the weight multiplies it


FORMS = (Form(0.0, True), Form(0.0, False), Form(1.0, False))  # Llama, OLMo 2, Gemma


def composed(x: Tensor, weight: Tensor, eps: float, form: Form) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension, via float32."""
    wide = x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if form.rounded_between:
        return weight * normal.to(x.dtype)
    return (normal * (weight.float() + form.offset)).to(x.dtype)


def recognise(module: nn.Module) -> tuple[float, Form] | None:
    """Return the eps and form of an RMSNorm, found by trying it; None for other modules."""
    weight = module._parameters.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if (
        not type(module).__name__.endswith("RMSNorm")
        or len(module._parameters) != 1
        or not isinstance(eps, float)
        or weight is None
        or weight.dim() != 1
        or not weight.is_floating_point()
    ):
        return None
    trial = copy.copy(module)
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, len(weight), generator=generator).to(weight.dtype) for n in (3, 1))
    trial._parameters = {"weight": nn.Parameter(w[0])}
    with torch.no_grad():
        got = type(module).forward(trial, x)
        for form in FORMS:
            if torch.equal(got, composed(x, w[0], eps, form)):
                return eps, form
    return None
