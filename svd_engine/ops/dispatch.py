"""Choose a backend for a checked operator call, launch it, and register operators with torch.

A backend is a module with `unavailable() -> str | None`, `takes(device) -> bool` and a function for
each operator that it has: the operator's arguments, then its outputs, which are allocated here.
"""

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svd_engine.kernels import reference
from svd_engine.kernels.arguments import Draw, Mask, keywords
from svd_engine.ops import schema
from svd_engine.ops.schema import Fields

MODULES = {
    "triton": "svd_engine.kernels.launch",
    "cuda": "svd_engine.ops.cuda",
    "cpu": "svd_engine.ops.cpu",
}
# What "auto" takes, by device. On an H200 (benchmarks/results/gpu.json) Triton takes less time than
# CUDA C++ for nearly every operator, dtype and number of rows. That number decides nothing: a row's
# bits would depend on its batch.
PREFERENCE = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}

logger = logging.getLogger(__name__)


class Operator(NamedTuple):
    """An operator: what it takes and returns, how its outputs are allocated, its reference."""

    arguments: Fields
    returns: str
    outputs: Callable[..., tuple[Tensor, ...]]  # from the arguments
    reference: Callable[..., tuple[Tensor, ...]]
    read: int | None = None  # how many arguments backends take, None for all; the rest allocate


def _floats(adapted: Tensor, *size: int) -> Tensor:
    return adapted.new_empty(adapted.shape[0], *size, dtype=torch.float32)


def _drawn(adapted: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    n = adapted.shape[0]
    return adapted.new_empty(n, dtype=torch.int64), adapted.new_empty(n, dtype=torch.float32)


def _listed(adapted: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    n, capacity = adapted.shape[0], rest[-1]
    lists = _floats(adapted, capacity), _floats(adapted, capacity)
    token = adapted.new_empty(n, capacity, dtype=torch.int64)
    size = adapted.new_empty(n, dtype=torch.int64)
    return token, *lists, *(_floats(adapted) for _ in range(4)), size


ROWS: Fields = {"adapted": Tensor, "base": Tensor}
OPERATORS = {
    "steering_vector": Operator(
        {**ROWS, "direction": str},
        "Tensor",
        lambda z, *_: (torch.empty_like(z, dtype=torch.float32),),
        lambda z, b, direction: (reference.steering_vector(z, b, direction),),
    ),
    "steer": Operator(
        {**ROWS, "mask": Mask, "dtype": torch.dtype | None},
        "Tensor",
        lambda z, b, mask, dtype: (torch.empty_like(z, dtype=dtype),),
        lambda z, b, mask, dtype: (reference.steer(z, b, **keywords(mask), dtype=dtype),),
        read=3,
    ),
    "sample": Operator(
        {**ROWS, "mask": Mask, "draw": Draw},
        "(Tensor, Tensor)",
        _drawn,
        lambda z, b, mask, draw: reference.sample(z, b, **keywords(mask), **keywords(draw)),
    ),
    "topk": Operator(
        {**ROWS, "mask": Mask, "k": int},
        "(Tensor, Tensor)",
        lambda z, b, mask, k: (_floats(z, k), z.new_empty(z.shape[0], k, dtype=torch.int64)),
        lambda z, b, mask, k: reference.topk(z, b, k=k, **keywords(mask)),
    ),
    "project_strength": Operator(
        {**ROWS, "target": Tensor, "alpha": float, "direction": str},
        "(Tensor, Tensor, Tensor, Tensor)",
        lambda z, *_: (*(_floats(z) for _ in range(3)), z.new_empty(z.shape[0], dtype=torch.bool)),
        lambda z, b, target, alpha, direction: reference.project_strength(
            z, b, target, alpha=alpha, direction=direction
        ),
    ),
    "support": Operator(
        {**ROWS, "target": Tensor, "alpha": float, "direction": str, "capacity": int},
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _listed,
        lambda z, b, target, alpha, direction, capacity: reference.support(
            z, b, target, capacity, alpha=alpha, direction=direction
        ),
    ),
    "score": Operator(
        {**ROWS, "mask": Mask, "target": Tensor},
        "Tensor",
        lambda z, *_: (_floats(z),),
        lambda z, b, mask, target: (reference.score(z, b, target=target, **keywords(mask)),),
    ),
    "divergence": Operator(
        ROWS,
        "Tensor",
        lambda z, b: (_floats(z),),
        lambda z, b: (reference.divergence(z, b),),
    ),
}


@cache
def unavailable(backend: str) -> str | None:
    """Return why a backend cannot run here, or None if it can."""
    if backend == "reference":
        return None
    try:
        return import_module(MODULES[backend]).unavailable()
    except ImportError as error:
        return f"import failed: {error}"


@cache
def choose(operator: str, backend: str, device: torch.device) -> ModuleType:
    """Return the module that computes `operator` on a device. Raises ValueError."""
    kind = device.type
    if backend == "auto":
        order = PREFERENCE.get(kind, ())
        modules = (import_module(MODULES[name]) for name in order if unavailable(name) is None)
        able = (module for module in modules if module.takes(kind) and hasattr(module, operator))
        module = next(able, reference)
        if kind in PREFERENCE and all(map(unavailable, PREFERENCE[kind])):
            _tell(kind)
        return module
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


@cache
def _tell(kind: str) -> None:
    """Log once that operators run in PyTorch, and why."""
    reasons = "; ".join(f"{name}: {unavailable(name)}" for name in PREFERENCE[kind])
    logger.warning("No native kernels for %s, so decoding is slower (%s).", kind, reasons)


def launch(
    name: str, backend: str, arguments: tuple[Any, ...], out: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Run an operator on checked arguments; return its outputs, the first in `out` if given."""
    adapted = arguments[0]
    module = choose(name, backend, adapted.device)
    operator = OPERATORS[name]
    if module is reference or adapted.numel() == 0:
        with torch.no_grad():
            computed = operator.reference(*arguments)
            return computed if out is None else (out.copy_(computed[0]),)
    outputs = operator.outputs(*arguments) if out is None else (out,)
    getattr(module, name)(*arguments[: operator.read], *outputs)
    return outputs


def traced(name: str, backend: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return the outputs of torch.ops.svd_engine.<name>."""
    outputs = getattr(torch.ops.svd_engine, name)(*schema.flat(arguments), backend)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def register(
    library: torch.library.Library,
    name: str,
    fields: Fields,
    returns: str,
    run: Callable[..., tuple[Tensor, ...]],
    outputs: Callable[..., tuple[Tensor, ...]],
) -> None:
    """Define torch.ops.svd_engine.<name>; `backend` is its last argument and the first of `run`."""

    def real(*leaves: Any) -> Any:
        return returned(run(leaves[-1], *schema.packed(fields, iter(leaves))))

    def fake(*leaves: Any) -> Any:
        return returned(outputs(*schema.packed(fields, iter(leaves))))

    def returned(computed: tuple[Tensor, ...]) -> Any:
        return tuple(computed) if len(computed) > 1 else computed[0]

    library.define(f"{name}({schema.declared(fields)}, str backend) -> {returns}")
    library.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"svd_engine::{name}", fake, lib=library)


def _register(library: torch.library.Library, registered: str, name: str) -> None:
    operator = OPERATORS[name]

    def run(backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        return launch(name, backend, arguments)

    register(library, registered, operator.arguments, operator.returns, run, operator.outputs)


_library = torch.library.Library("svd_engine", "DEF")
for _name in OPERATORS:
    _register(_library, _name, _name)
_register(_library, "sample_cut", "sample")  # exported graphs hold a sample with cuts by this name
