"""The operators: each checks its arguments, chooses a backend and calls its kernel.

`kernels/reference.py` defines what each one computes. Rows are `[N, V]` logits of the adapted and
the base model: float32, bfloat16 or float16 in any mix, any row stride; arithmetic is float32 and
no gradient flows. `backend="auto"` takes the fastest that can run and falls back to the reference;
a backend asked for by name runs or raises. Bad arguments raise ValueError before any work.

Every operator is also `torch.ops.svd_engine.<name>`, which is what `torch.compile` traces; eager
calls go straight to the kernel.
"""

import math
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from svd_engine.kernels.arguments import named
from svd_engine.kernels.reference import (
    NOISE_VERSION,
    Projection,
    Sampled,
    Strength,
    Support,
    TopK,
)
from svd_engine.ops import checks, dispatch
from svd_engine.ops.head import Head
from svd_engine.ops.hidden_states import (
    linear_divergence,
    linear_project_strength,
    linear_score,
    linear_topk,
)

__all__ = [
    "NOISE_VERSION",
    "Head",
    "backends",
    "divergence",
    "linear_divergence",
    "linear_project_strength",
    "linear_score",
    "linear_topk",
    "project_strength",
    "sample",
    "score",
    "steer",
    "steering_vector",
    "support",
    "topk",
    "warmup",
]
INF = math.inf
USUAL = 64  # tokens of a support, mostly fewer


def steering_vector(
    adapted: Tensor, base: Tensor, *, direction: str = "projected", backend: str = "auto"
) -> Tensor:
    """Return delta_i = p_i (E_p[d] - d_i), d = adapted - base  (10), float32 `[N, V]`.

    direction, here and below: "projected", or "difference" for delta_i = E_p[d] - d_i.
    """
    adapted, base = _rows(adapted, base, backend)
    checks.check_direction(direction)
    return _call("steering_vector", backend, adapted, base, direction)[0]


def steer(
    adapted: Tensor,
    base: Tensor,
    strength: Strength,
    *,
    alpha: float = 0.1,
    penalty: float = -INF,
    direction: str = "projected",
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return steered logits  (12)-(14), `[N, V]` in the dtype of `out` or of `adapted`.

    for i in range(V):
        if adapted[i] >= max(adapted) + log(alpha):
            out[i] = adapted[i] + strength * delta[i]
        else:
            out[i] = -inf if penalty == -inf else adapted[i] + abs(strength) * penalty

    strength: a number or `[N]`. penalty <= 0; -inf removes tokens off the support at any strength.
    """
    adapted, base = _rows(adapted, base, backend)
    mask = checks.mask(strength, alpha, penalty, direction, adapted)
    if out is not None:
        checks.out(out, adapted, base)
    dtype = None if out is None else out.dtype
    return _call("steer", backend, adapted, base, mask, dtype, out=out)[0]


def sample(
    adapted: Tensor,
    base: Tensor,
    strength: Strength,
    *,
    alpha: float = 0.1,
    penalty: float = -INF,
    direction: str = "projected",
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Tensor = 0,
    position: int | Tensor = 0,
    backend: str = "auto",
) -> Sampled:
    """Choose one token per row from the steered distribution.

    Returns `token` int64 `[N]` and `logprob` float32 `[N]`, the `score` of the token, before
    temperature and cuts. temperature 0 is greedy; ties go to the lowest id. Otherwise the noise is
    a function of seed, position (numbers or int64 `[N]`) and token id only. A row with NaN or +inf
    gives token -1.
    """
    adapted, base = _rows(adapted, base, backend)
    mask = checks.mask(strength, alpha, penalty, direction, adapted)
    draw = checks.draw(temperature, top_k, top_p, min_p, seed, position, adapted)
    return named(Sampled, _call("sample", backend, adapted, base, mask, draw))


def topk(
    adapted: Tensor,
    base: Tensor,
    strength: Strength,
    k: int,
    *,
    alpha: float = 0.1,
    penalty: float = -INF,
    direction: str = "projected",
    backend: str = "auto",
) -> TopK:
    """Return the k best steered log-probabilities, descending, and their tokens, `[N, k]`."""
    adapted, base = _rows(adapted, base, backend)
    mask = checks.mask(strength, alpha, penalty, direction, adapted)
    checks.k(k, adapted.shape[1])
    return named(TopK, _call("topk", backend, adapted, base, mask, k))


def project_strength(
    adapted: Tensor,
    base: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.1,
    direction: str = "projected",
    backend: str = "auto",
) -> Projection:
    """Return numerator, gauss_newton (20), newton (19) and in_support of each target, `[N]`."""
    adapted, base = _rows(adapted, base, backend)
    checks.support(alpha, penalty=0.0)
    checks.check_direction(direction)
    checks.target(target, adapted, adapted.shape[1])
    rest = target, alpha, direction
    return named(Projection, _call("project_strength", backend, adapted, base, *rest))


def support(
    adapted: Tensor,
    base: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.1,
    direction: str = "projected",
    capacity: int | None = None,
    backend: str = "auto",
) -> Support:
    """List the support of each row: token, p and delta, lowest token first, `[N, C]`.

    Beside it, `[N]` each: log p and log q of the target, E_p[d], KL(p || q) and the support's size.
    capacity: the slots C, of which unused ones hold -1, 0 and 0; a row with a larger support lists
    its first C tokens. None lists every support whole: it waits for the sizes, and reads the rows
    again where one exceeds 64.
    """
    adapted, base = _rows(adapted, base, backend)
    checks.support(alpha, penalty=0.0)
    checks.check_direction(direction)
    checks.target(target, adapted, adapted.shape[1])
    if capacity is not None:
        checks.capacity(capacity)
    elif torch.compiler.is_compiling():
        raise ValueError("capacity must be a number in compiled code, which cannot wait; got None.")
    arguments = "support", backend, adapted, base, target, alpha, direction
    listed = named(Support, _call(*arguments, capacity or min(USUAL, adapted.shape[1])))
    if capacity is None and len(listed.size):
        largest = int(listed.size.max())
        if largest > USUAL:
            listed = named(Support, _call(*arguments, largest))
    return listed


def score(
    adapted: Tensor,
    base: Tensor,
    strength: Strength,
    target: Tensor,
    *,
    alpha: float = 0.1,
    penalty: float = -INF,
    direction: str = "projected",
    backend: str = "auto",
) -> Tensor:
    """Return log_softmax of the steered logits at `target` int64 `[N]`, float32 `[N]`."""
    adapted, base = _rows(adapted, base, backend)
    mask = checks.mask(strength, alpha, penalty, direction, adapted)
    checks.target(target, adapted, adapted.shape[1])
    return _call("score", backend, adapted, base, mask, target)[0]


def divergence(adapted: Tensor, base: Tensor, *, backend: str = "auto") -> Tensor:
    """Return KL(p || q)  (6) in nats, float32 `[N]`."""
    adapted, base = _rows(adapted, base, backend)
    return _call("divergence", backend, adapted, base)[0]


def backends() -> dict[str, str | None]:
    """Return for every backend the reason why it cannot run here, or None if it can."""
    return {name: dispatch.unavailable(name) for name in (*dispatch.MODULES, "reference")}


def warmup(
    vocab: int,
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16),
    device: torch.device | str = "cpu",
) -> None:
    """Compile every kernel that operators on this device can need.

    vocab and dtypes: those of the logits to come. Afterwards no batch size compiles anything. The
    CPU's kernels are compiled at install time.
    """
    device = torch.device(device)
    if device.type == "cuda" and dispatch.unavailable("triton") is None:
        import_module(dispatch.MODULES["triton"]).warmup(vocab, tuple(dtypes), device)


def _rows(adapted: Tensor, base: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    checks.rows(adapted, base, checks.ALL_DTYPES if backend == "reference" else checks.DTYPES)
    # Kernels walk columns that lie next to each other; any other layout is copied once.
    return (
        adapted if adapted.is_contiguous() or adapted.stride(1) == 1 else adapted.contiguous(),
        base if base.is_contiguous() or base.stride(1) == 1 else base.contiguous(),
    )


def _call(name: str, backend: str, *arguments: Any, out: Tensor | None = None) -> Any:
    """Call the kernel directly, or under torch.compile as one traced node."""
    if not torch.compiler.is_compiling():
        return dispatch.launch(name, backend, arguments, out)
    outputs = dispatch.traced(name, backend, arguments)
    return outputs if out is None else (out.copy_(outputs[0]),)
