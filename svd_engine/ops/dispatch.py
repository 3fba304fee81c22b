"""From a checked operator call to a backend: the choice, the launch, the registration with torch.

A backend is a module with `unavailable() -> str | None`, `takes(device) -> bool` and a function for
each operator that it has: the operator's arguments, then its outputs, which are allocated here.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svd_engine.kernels import reference

MODULES = {
    "triton": "svd_engine.kernels.launch",
    "cuda": "svd_engine.ops.cuda",
    "cpu": "svd_engine.ops.cpu",
}
PREFERENCE = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}  # what "auto" takes, by device

_ROWS = "Tensor adapted, Tensor base"
_STRENGTH = "float strength, Tensor? strengths"  # the tensor wins where it is given
_MASK = "float alpha, float penalty"
_DRAW = "SymInt seed, Tensor? seeds, SymInt position, Tensor? positions"


class Operator(NamedTuple):
    """One operator: its schema, its reference, and how its outputs are allocated."""

    arguments: str
    returns: str
    outputs: Callable[..., tuple[Tensor, ...]]  # from the arguments
    reference: Callable[..., tuple[Tensor, ...]]


def _floats(adapted: Tensor, *size: int) -> Tensor:
    return adapted.new_empty(adapted.shape[0], *size, dtype=torch.float32)


def _drawn(adapted: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    n = adapted.shape[0]
    return adapted.new_empty(n, dtype=torch.int64), adapted.new_empty(n, dtype=torch.float32)


OPERATORS = {
    "steering_vector": Operator(
        _ROWS,
        "Tensor",
        lambda z, b: (torch.empty_like(z, dtype=torch.float32),),
        lambda z, b: (reference.steering_vector(z, b),),
    ),
    "steer": Operator(
        f"{_ROWS}, {_STRENGTH}, {_MASK}, ScalarType dtype",
        "Tensor",
        lambda z, b, mu, alpha, penalty, dtype: (torch.empty_like(z, dtype=dtype),),
        lambda z, b, mu, alpha, penalty, dtype: (
            reference.steer(z, b, mu, alpha=alpha, penalty=penalty, dtype=dtype),
        ),
    ),
    "sample": Operator(
        f"{_ROWS}, {_STRENGTH}, {_MASK}, float temperature, {_DRAW}",
        "(Tensor, Tensor)",
        _drawn,
        lambda z, b, mu, alpha, penalty, temperature, seed, position: reference.sample(
            z, b, mu, alpha=alpha, penalty=penalty, temperature=temperature, seed=seed,
            position=position,
        ),
    ),
    "sample_cut": Operator(
        f"{_ROWS}, {_STRENGTH}, {_MASK}, float temperature, SymInt top_k, float top_p, "
        f"float min_p, {_DRAW}",
        "(Tensor, Tensor)",
        _drawn,
        lambda z, b, mu, alpha, penalty, temperature, k, p, m, seed, position: reference.sample(
            z, b, mu, alpha=alpha, penalty=penalty, temperature=temperature, top_k=k, top_p=p,
            min_p=m, seed=seed, position=position,
        ),
    ),
    "topk": Operator(
        f"{_ROWS}, {_STRENGTH}, SymInt k, {_MASK}",
        "(Tensor, Tensor)",
        lambda z, b, mu, k, *rest: (_floats(z, k), z.new_empty(len(z), k, dtype=torch.int64)),
        lambda z, b, mu, k, alpha, penalty: reference.topk(
            z, b, mu, k, alpha=alpha, penalty=penalty
        ),
    ),
    "project_strength": Operator(
        f"{_ROWS}, Tensor target, float alpha",
        "(Tensor, Tensor, Tensor, Tensor)",
        lambda z, *rest: (
            _floats(z), _floats(z), _floats(z), z.new_empty(z.shape[0], dtype=torch.bool)
        ),
        lambda z, b, target, alpha: reference.project_strength(z, b, target, alpha=alpha),
    ),
    "score": Operator(
        f"{_ROWS}, Tensor target, {_STRENGTH}, {_MASK}",
        "Tensor",
        lambda z, *rest: (_floats(z),),
        lambda z, b, target, mu, alpha, penalty: (
            reference.score(z, b, target, mu, alpha=alpha, penalty=penalty),
        ),
    ),
    "divergence": Operator(
        _ROWS,
        "Tensor",
        lambda z, b: (_floats(z),),
        lambda z, b: (reference.divergence(z, b),),
    ),
}  # fmt: skip


@cache
def unavailable(backend: str) -> str | None:
    """Why a backend cannot run here; None where it can."""
    if backend == "reference":
        return None
    try:
        return import_module(MODULES[backend]).unavailable()
    except ImportError as error:
        return f"import failed: {error}"


@cache
def choose(operator: str, backend: str, device: torch.device) -> ModuleType:
    """The module that computes `operator` on tensors of a device. Raises ValueError."""
    kind = device.type
    if backend == "auto":
        modules = (
            import_module(MODULES[name])
            for name in PREFERENCE.get(kind, ())
            if unavailable(name) is None
        )
        able = (module for module in modules if module.takes(kind) and hasattr(module, operator))
        return next(able, reference)
    if backend == "reference":
        return reference
    if backend not in MODULES:
        names = ", ".join(("auto", *MODULES, "reference"))
        raise ValueError(f"backend must be one of {names}; got {backend!r}.")
    reason = unavailable(backend)
    if reason is None:
        module = import_module(MODULES[backend])
        if module.takes(kind) and hasattr(module, operator):
            return module
        reason = f"it has no {operator} for {kind} tensors"
    raise ValueError(f"backend={backend!r} cannot run here: {reason}. backend='auto' falls back.")


def launch(
    name: str, backend: str, arguments: tuple[Any, ...], out: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Run an operator whose arguments are checked; its outputs, the first one in `out` if given."""
    adapted = arguments[0]
    module = choose(name, backend, adapted.device)
    operator = OPERATORS[name]
    if module is reference or adapted.numel() == 0:
        with torch.no_grad():
            computed = operator.reference(*arguments)
            return computed if out is None else (out.copy_(computed[0]),)
    outputs = operator.outputs(*arguments) if out is None else (out,)
    if name == "steer":
        arguments = arguments[:-1]  # the output says the dtype
    getattr(module, name)(*arguments, *outputs)
    return outputs


def unfold(name: str, arguments: Sequence[Any]) -> list[Any]:
    """The arguments as the schema has them: what may be a number or a tensor is a pair there."""
    values, unfolded = iter(arguments), []
    for kind in _kinds(name):
        if kind != "Tensor?":
            unfolded.append(next(values))
        elif isinstance(unfolded[-1], Tensor):
            unfolded[-1:] = [0, unfolded[-1]]
        else:
            unfolded.append(None)
    return unfolded


def fold(name: str, arguments: Sequence[Any]) -> list[Any]:
    """The arguments of the schema as `launch` takes them: the tensor of a pair, or its number."""
    folded: list[Any] = []
    for kind, value in zip(_kinds(name), arguments, strict=True):
        if kind != "Tensor?":
            folded.append(value)
        elif value is not None:
            folded[-1] = value
    return folded


def _kinds(name: str) -> list[str]:
    return [argument.split()[0] for argument in OPERATORS[name].arguments.split(", ")]


def unwrap(outputs: tuple[Tensor, ...]) -> Any:
    """As an operator returns them to torch: one tensor is no tuple."""
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


def wrap(returned: Any) -> tuple[Tensor, ...]:
    return returned if isinstance(returned, tuple) else (returned,)


def register(
    library: torch.library.Library,
    name: str,
    arguments: str,
    returns: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
) -> None:
    """Define torch.ops.svd_engine.<name>; `backend` is its last argument."""
    library.define(f"{name}({arguments}, str backend) -> {returns}")
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"svd_engine::{name}", fake, lib=library)


def _kernels(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The operator as torch calls it, and as torch traces it."""

    def run(*arguments: Any) -> Any:
        return unwrap(launch(name, arguments[-1], tuple(fold(name, arguments[:-1]))))

    def fake(*arguments: Any) -> Any:
        return unwrap(OPERATORS[name].outputs(*fold(name, arguments[:-1])))

    return run, fake


_library = torch.library.Library("svd_engine", "DEF")
for _name, _operator in OPERATORS.items():
    register(_library, _name, _operator.arguments, _operator.returns, *_kernels(_name))
