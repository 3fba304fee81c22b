"""RMSNorm as one native call, for modules that are found to compute the same."""

import copy
import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from svd_engine.model.layers import linear
from svd_engine.ops import cpu

MAX_ELEMENTS = 1 << 15  # as many as a decode step has


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


def use_native_forward(module: nn.Module) -> None:
    """Give a recognised RMSNorm the native forward pass for few rows."""
    if "forward" not in module.__dict__ and (found := recognise(module)):
        # `module` is a shallow copy. A subclass keeps isinstance checks and survives more copies; a
        # bound `forward` in `__dict__` would go on serving the first copy. transformers' own way,
        # `@use_kernel_forward_from_hub("RMSNorm")` with `register_kernel_mapping`, does not fit:
        # without the optional package `kernels` the decorator does nothing and the function raises;
        # a mapping knows names, and Llama and OLMo 2 round differently under this one; and Gemma's
        # norms are not decorated.
        module.__class__ = _with_native(type(module))  # type: ignore[arg-type]
        module.native_form = found  # type: ignore


@functools.cache
def _with_native(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        if (
            x.numel() > MAX_ELEMENTS
            or not x.is_contiguous()
            or not linear.can_run_natively(x, weight)
        ):
            return cls.forward(self, x)
        eps, form = self.native_form  # type: ignore
        out = torch.empty_like(x)
        cpu.rms_norm(x, weight, eps, form.offset, form.rounded_between, out)
        return out

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
