"""The operators: arguments checked, a backend chosen, the kernel called.

`kernels/reference.py` defines what each one computes. Rows are `[N, V]` logits of the adapted and
the base model: float32, bfloat16 or float16 in any mix, any row stride; arithmetic is float32 and
no gradient flows. `backend="auto"` takes the fastest that can run and falls back to the reference;
a backend asked for by name runs or raises. Bad arguments raise ValueError before any work.

Every operator is also `torch.ops.svd_engine.<name>`, which is what `torch.compile` traces; eager
calls go straight to the kernel.
"""

import math
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from svd_engine import checks
from svd_engine.kernels import reference
from svd_engine.kernels.reference import Projection, Sampled, Strength, TopK

INF = math.inf
_MODULES = {
    "triton": "svd_engine.kernels.launch",
    "cuda": "svd_engine.cuda",
    "cpu": "svd_engine.native",
}
_FAST = {"steer", "sample"}  # the other operators run on the reference
_PREFERENCE = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}  # then the reference


def steering_vector(adapted: Tensor, base: Tensor, *, backend: str = "auto") -> Tensor:
    """delta_i = p_i (E_p[d] - d_i), d = adapted - base  (10), float32 `[N, V]`."""
    adapted, base = _rows(adapted, base, backend)
    return _call("steering_vector", adapted, base, backend)


def steer(
    adapted: Tensor,
    base: Tensor,
    strength: Strength,
    *,
    alpha: float = 0.1,
    penalty: float = -INF,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Steered logits  (12)-(14), `[N, V]` in the dtype of `out` or of `adapted`.

    for i in range(V):
        if adapted[i] >= max(adapted) + log(alpha):
            out[i] = adapted[i] + strength * delta[i]
        else:
            out[i] = -inf if penalty == -inf else adapted[i] + abs(strength) * penalty

    strength: a number or `[N]`. penalty <= 0; -inf removes tokens off the support at any strength.
    """
    adapted, base = _rows(adapted, base, backend)
    strengths = checks.per_row("strength", strength, adapted, torch.float32)
    checks.mask(alpha, penalty)
    if out is None:
        out = torch.empty(adapted.shape, dtype=adapted.dtype, device=adapted.device)
    else:
        checks.out(out, adapted)
    scalar = 0.0 if strengths is not None else float(strength)
    _call("steer", adapted, base, scalar, strengths, alpha, penalty, out, backend)
    return out


def sample(
    adapted: Tensor,
    base: Tensor,
    strength: Strength,
    *,
    alpha: float = 0.1,
    penalty: float = -INF,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Tensor = 0,
    position: int | Tensor = 0,
    backend: str = "auto",
) -> Sampled:
    """One token a row from the steered distribution: `token` int64 `[N]`, `logprob` float32 `[N]`.

    temperature 0 is greedy, ties to the lowest id. Otherwise the noise is a function of (seed,
    position, token id) alone: numbers or int64 `[N]`. `logprob` equals `score` of the token: it is
    taken before temperature and cuts. A row with NaN or +inf gives token -1.
    """
    adapted, base = _rows(adapted, base, backend)
    strengths = checks.per_row("strength", strength, adapted, torch.float32)
    checks.mask(alpha, penalty)
    checks.sampling(temperature, top_k, top_p, min_p)
    seeds = checks.per_row("seed", seed, adapted, torch.int64)
    positions = checks.per_row("position", position, adapted, torch.int64)
    token, logprob = _call(
        "sample", adapted, base, 0.0 if strengths is not None else float(strength), strengths,
        alpha, penalty, temperature, top_k, top_p, min_p, 0 if seeds is not None else seed, seeds,
        0 if positions is not None else position, positions, backend,
    )  # fmt: skip
    return Sampled(token, logprob)


def topk(
    adapted: Tensor,
    base: Tensor,
    strength: Strength,
    k: int,
    *,
    alpha: float = 0.1,
    penalty: float = -INF,
    backend: str = "auto",
) -> TopK:
    """The k best steered log-probabilities, descending, and their tokens: `[N, k]` each."""
    adapted, base = _rows(adapted, base, backend)
    strengths = checks.per_row("strength", strength, adapted, torch.float32)
    checks.mask(alpha, penalty)
    if not 1 <= k <= adapted.shape[1]:
        raise ValueError(f"k must lie in [1, V = {adapted.shape[1]}]; got {k}.")
    scalar = 0.0 if strengths is not None else float(strength)
    return TopK(*_call("topk", adapted, base, scalar, strengths, k, alpha, penalty, backend))


def project_strength(
    adapted: Tensor, base: Tensor, target: Tensor, *, alpha: float = 0.1, backend: str = "auto"
) -> Projection:
    """numerator, gauss_newton (20) and newton (19) denominators, in_support; `[N]` each."""
    adapted, base = _rows(adapted, base, backend)
    checks.mask(alpha, 0.0)
    checks.target(target, adapted)
    return Projection(*_call("project_strength", adapted, base, target, alpha, backend))


def score(
    adapted: Tensor,
    base: Tensor,
    target: Tensor,
    strength: Strength,
    *,
    alpha: float = 0.1,
    penalty: float = -INF,
    backend: str = "auto",
) -> Tensor:
    """log_softmax of the steered logits at `target` int64 `[N]`: log P_hat, float32 `[N]`."""
    adapted, base = _rows(adapted, base, backend)
    strengths = checks.per_row("strength", strength, adapted, torch.float32)
    checks.mask(alpha, penalty)
    checks.target(target, adapted)
    scalar = 0.0 if strengths is not None else float(strength)
    return _call("score", adapted, base, target, scalar, strengths, alpha, penalty, backend)


def divergence(adapted: Tensor, base: Tensor, *, backend: str = "auto") -> Tensor:
    """KL(p || q)  (6) in nats, float32 `[N]`."""
    adapted, base = _rows(adapted, base, backend)
    return _call("divergence", adapted, base, backend)


def backends() -> dict[str, str | None]:
    """Every backend with the reason why it cannot run here, or None where it can."""
    return {name: _unavailable(name) for name in (*_MODULES, "reference")}


def _rows(adapted: Tensor, base: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    extra = (torch.float64,) if backend == "reference" else ()
    checks.rows(adapted, base, checks.DTYPES + extra)
    # Kernels walk columns that lie next to each other; any other layout is copied once.
    return (
        adapted if adapted.stride(1) == 1 else adapted.contiguous(),
        base if base.stride(1) == 1 else base.contiguous(),
    )


@cache
def _unavailable(backend: str) -> str | None:
    if backend == "reference":
        return None
    try:
        return import_module(_MODULES[backend]).unavailable()
    except ImportError as error:
        return f"import failed: {error}"


@cache
def _choose(operator: str, backend: str, device: str) -> ModuleType:
    """The module that computes `operator` on tensors of a device type."""
    if backend == "auto":
        fast = _PREFERENCE.get(device, ()) if operator in _FAST else ()
        running = (name for name in fast if _unavailable(name) is None)
        backend = next(running, "reference")
    if backend == "reference":
        return reference
    if backend not in _MODULES:
        names = ", ".join(("auto", *_MODULES, "reference"))
        raise ValueError(f"backend must be one of {names}; got {backend!r}.")
    reason = _unavailable(backend)
    if operator not in _FAST:
        reason = f"{operator} runs on the reference only"
    elif reason is None and not import_module(_MODULES[backend]).takes(device):
        reason = f"the logits are on {device}"
    if reason is not None:
        raise ValueError(
            f"backend={backend!r} cannot run here: {reason}. backend='auto' falls back."
        )
    return import_module(_MODULES[backend])


def _steer(adapted, base, strength, strengths, alpha, penalty, out, backend) -> None:
    mu = strength if strengths is None else strengths
    chosen = _choose("steer", backend, adapted.device.type)
    if chosen is reference:
        out.copy_(reference.steer(adapted, base, mu, alpha=alpha, penalty=penalty, dtype=out.dtype))
    else:
        chosen.steer(adapted, base, mu, alpha, penalty, out)


def _sample(
    adapted, base, strength, strengths, alpha, penalty, temperature, top_k, top_p, min_p,
    seed, seeds, position, positions, backend,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    mu = strength if strengths is None else strengths
    seed = seed if seeds is None else seeds
    position = position if positions is None else positions
    cut = temperature > 0 and (top_k > 0 or top_p < 1 or min_p > 0)
    operator = "sample with top_k, top_p or min_p" if cut else "sample"
    chosen = _choose(operator, backend, adapted.device.type)
    if chosen is reference:
        sampled = reference.sample(
            adapted, base, mu, alpha=alpha, penalty=penalty, temperature=temperature,
            top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, position=position,
        )  # fmt: skip
        return sampled.token, sampled.logprob
    token = torch.empty(len(adapted), dtype=torch.int64, device=adapted.device)
    logprob = torch.empty(len(adapted), dtype=torch.float32, device=adapted.device)
    chosen.sample(adapted, base, mu, alpha, penalty, temperature, seed, position, token, logprob)
    return token, logprob


def _steering_vector(adapted, base, backend) -> Tensor:
    chosen = _choose("steering_vector", backend, adapted.device.type)
    return chosen.steering_vector(adapted, base)


def _topk(adapted, base, strength, strengths, k, alpha, penalty, backend) -> tuple[Tensor, ...]:
    mu = strength if strengths is None else strengths
    chosen = _choose("topk", backend, adapted.device.type)
    return tuple(chosen.topk(adapted, base, mu, k, alpha=alpha, penalty=penalty))


def _project_strength(adapted, base, target, alpha, backend) -> tuple[Tensor, ...]:
    chosen = _choose("project_strength", backend, adapted.device.type)
    return tuple(chosen.project_strength(adapted, base, target, alpha=alpha))


def _score(adapted, base, target, strength, strengths, alpha, penalty, backend) -> Tensor:
    mu = strength if strengths is None else strengths
    chosen = _choose("score", backend, adapted.device.type)
    return chosen.score(adapted, base, target, mu, alpha=alpha, penalty=penalty)


def _divergence(adapted, base, backend) -> Tensor:
    return _choose("divergence", backend, adapted.device.type).divergence(adapted, base)


def _float_rows(adapted: Tensor, *rest: Any) -> Tensor:
    return adapted.new_empty(adapted.shape[0], dtype=torch.float32)


def _token_rows(adapted: Tensor) -> Tensor:
    return adapted.new_empty(adapted.shape[0], dtype=torch.int64)


_ROWS = "Tensor adapted, Tensor base"
_STRENGTH = "float strength, Tensor? strengths"
_MASK = "float alpha, float penalty"
# name -> (schema, implementation, what it returns on tensors without data)
_OPERATORS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "steering_vector": (
        f"({_ROWS}, str backend) -> Tensor",
        _steering_vector,
        lambda adapted, *rest: torch.empty_like(adapted, dtype=torch.float32),
    ),
    "steer": (
        f"({_ROWS}, {_STRENGTH}, {_MASK}, Tensor(a!) out, str backend) -> ()",
        _steer,
        lambda *rest: None,
    ),
    "sample": (
        f"({_ROWS}, {_STRENGTH}, {_MASK}, float temperature, SymInt top_k, float top_p, "
        "float min_p, SymInt seed, Tensor? seeds, SymInt position, Tensor? positions, str backend) "
        "-> (Tensor, Tensor)",
        _sample,
        lambda adapted, *rest: (_token_rows(adapted), _float_rows(adapted)),
    ),
    "topk": (
        f"({_ROWS}, {_STRENGTH}, SymInt k, {_MASK}, str backend) -> (Tensor, Tensor)",
        _topk,
        lambda adapted, base, strength, strengths, k, *rest: (
            adapted.new_empty(adapted.shape[0], k, dtype=torch.float32),
            adapted.new_empty(adapted.shape[0], k, dtype=torch.int64),
        ),
    ),
    "project_strength": (
        f"({_ROWS}, Tensor target, float alpha, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
        _project_strength,
        lambda adapted, *rest: (
            *(_float_rows(adapted) for _ in range(3)),
            adapted.new_empty(adapted.shape[0], dtype=torch.bool),
        ),
    ),
    "score": (
        f"({_ROWS}, Tensor target, {_STRENGTH}, {_MASK}, str backend) -> Tensor",
        _score,
        _float_rows,
    ),
    "divergence": (f"({_ROWS}, str backend) -> Tensor", _divergence, _float_rows),
}

_library = torch.library.Library("svd_engine", "DEF")
for _name, (_schema, _eager, _fake) in _OPERATORS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"svd_engine::{_name}", _fake, lib=_library)


def _call(name: str, *args: Any) -> Any:
    if torch.compiler.is_compiling():
        return getattr(torch.ops.svd_engine, name)(*args)
    with torch.no_grad():
        return _OPERATORS[name][1](*args)
