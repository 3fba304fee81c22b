"""The operators from hidden states and the head that both models share.

Logits are computed for a few rows at a time, so memory does not grow with the number of rows.
"""

import math
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from svd_engine.kernels.reference import Head, Projection, Strength, TopK
from svd_engine.ops import checks, dispatch, schema

INF = math.inf
CHUNK_BYTES = 128 << 20  # logits of both models that are held at once
NAMES = ("topk", "score", "project_strength", "divergence")


def linear_topk(
    adapted: Tensor,
    base: Tensor,
    head: Head | Tensor,
    strength: Strength,
    k: int,
    *,
    alpha: float = 0.1,
    penalty: float = -INF,
    direction: str = "projected",
    backend: str = "auto",
) -> TopK:
    """Return `ops.topk` of the logits of hidden states `[N, H]`; head: `[V, H]` or a `Head`."""
    head = _checked(adapted, base, head)
    mask = checks.mask(strength, alpha, penalty, direction, adapted)
    checks.k(k, head.weight.shape[0])
    return TopK(*_call("topk", backend, adapted, base, head, mask, k))


def linear_score(
    adapted: Tensor,
    base: Tensor,
    head: Head | Tensor,
    strength: Strength,
    target: Tensor,
    *,
    alpha: float = 0.1,
    penalty: float = -INF,
    direction: str = "projected",
    backend: str = "auto",
) -> Tensor:
    """Return `ops.score` of the logits of hidden states `[N, H]`; head: `[V, H]` or a `Head`."""
    head = _checked(adapted, base, head)
    mask = checks.mask(strength, alpha, penalty, direction, adapted)
    checks.target(target, adapted, head.weight.shape[0])
    return _call("score", backend, adapted, base, head, mask, target)[0]


def linear_project_strength(
    adapted: Tensor,
    base: Tensor,
    head: Head | Tensor,
    target: Tensor,
    *,
    alpha: float = 0.1,
    direction: str = "projected",
    backend: str = "auto",
) -> Projection:
    """`ops.project_strength` of the head's logits of hidden states `[N, H]`."""
    head = _checked(adapted, base, head)
    checks.support(alpha, penalty=0.0)
    checks.check_direction(direction)
    checks.target(target, adapted, head.weight.shape[0])
    rest = target, alpha, direction
    return Projection(*_call("project_strength", backend, adapted, base, head, *rest))


def linear_divergence(
    adapted: Tensor, base: Tensor, head: Head | Tensor, *, backend: str = "auto"
) -> Tensor:
    """`ops.divergence` of the head's logits of hidden states `[N, H]`."""
    head = _checked(adapted, base, head)
    return _call("divergence", backend, adapted, base, head)[0]


def _checked(adapted: Tensor, base: Tensor, head: Head | Tensor) -> Head:
    head = Head(head) if isinstance(head, Tensor) else head
    dtypes = (*checks.DTYPES, torch.float64)
    checks.rows(adapted, base, dtypes)
    weight = head.weight
    if weight.ndim != 2 or weight.shape[1] != adapted.shape[1] or weight.device != adapted.device:
        raise ValueError(
            f"head must have shape [V, H] with H = {adapted.shape[1]} on {adapted.device}, as the "
            f"hidden states are; got {list(weight.shape)} on {weight.device}."
        )
    return head


def _call(name: str, backend: str, adapted: Tensor, base: Tensor, head: Head, *rest: Any) -> Any:
    if not torch.compiler.is_compiling():
        return _chunked(name, backend, adapted, base, head, *rest)
    return dispatch.traced(f"linear_{name}", backend, (adapted, base, head, *rest))


def _chunked(name: str, backend: str, adapted: Tensor, base: Tensor, head: Head, *rest: Any) -> Any:
    """The operator's outputs over all rows, from logits of `CHUNK_BYTES` at once."""
    rows, vocab = len(adapted), head.weight.shape[0]
    step = max(1, CHUNK_BYTES // (2 * vocab * adapted.element_size()))
    leaves, fields = schema.flat(rest), dispatch.OPERATORS[name].arguments
    parts = []
    for start in range(0, max(rows, 1), step):
        part = slice(start, start + step)
        with torch.no_grad():
            z, b = head.logits(adapted[part]), head.logits(base[part])
        some = (x[part] if isinstance(x, Tensor) else x for x in leaves)
        parts.append(dispatch.launch(name, backend, schema.packed(fields, chain((z, b), some))))
        del z, b
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _register(library: torch.library.Library, name: str) -> None:
    operator = dispatch.OPERATORS[name]
    adapted, base, *rest = operator.arguments.items()

    def run(backend: str, *arguments: Any) -> Any:
        return _chunked(name, backend, *arguments)

    def outputs(adapted: Tensor, base: Tensor, head: Head, *rest: Any) -> tuple[Tensor, ...]:
        logits = adapted.new_empty(adapted.shape[0], head.weight.shape[0])
        return operator.outputs(logits, logits, *rest)

    fields = dict([adapted, base, ("head", Head), *rest])
    dispatch.register(library, f"linear_{name}", fields, operator.returns, run, outputs)


_library = torch.library.Library("svd_engine", "FRAGMENT")
for _name in NAMES:
    _register(_library, _name)
