"""The C++ CPU kernels (csrc/cpu), where they were built.

Nothing is loaded before the first use, and importing this module cannot fail.
"""

import functools
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")


@functools.cache
def _load() -> SimpleNamespace | str:
    """The operators, or why there are none."""
    found = sorted(Path(__file__).parent.glob("_native*.so"))
    if not found:
        return "svd_engine._native was not built (see the output of pip install -v)"
    try:
        torch.ops.load_library(str(found[0]))
        ops = torch.ops.svd_engine_native
        return SimpleNamespace(
            steer=ops.steer.default,
            sample=ops.sample.default,
            capability=ops.capability.default,
        )
    except Exception as error:
        return f"{found[0].name} failed to load: {error}"


@functools.cache
def _ops() -> SimpleNamespace:
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


def unavailable() -> str | None:
    """Why the kernels cannot run here; None when they can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def takes(device: str) -> bool:
    """Whether tensors on this type of device can be computed on."""
    return device == "cpu"


def capability(limit: str | None = None) -> str:
    """The instruction set in use; `limit` first sets it to the best one not above."""
    return CAPABILITIES[_ops().capability(-1 if limit is None else CAPABILITIES.index(limit))]


@functools.lru_cache(maxsize=64)
def _log_alpha(alpha: float) -> float:
    return float(torch.tensor(alpha, dtype=torch.float32).log())


def steer(
    adapted: Tensor,
    base: Tensor,
    strength: float | Tensor,
    alpha: float,
    penalty: float,
    out: Tensor,
) -> None:
    """`reference.steer` into `out`, which may be `adapted` or `base` itself."""
    mu, mus = (0.0, strength) if isinstance(strength, Tensor) else (strength, None)
    _ops().steer(adapted, base, mu, mus, _log_alpha(alpha), penalty, out)


def sample(
    adapted: Tensor,
    base: Tensor,
    strength: float | Tensor,
    alpha: float,
    penalty: float,
    temperature: float,
    seed: int | Tensor,
    position: int | Tensor,
    token: Tensor,
    logprob: Tensor,
) -> None:
    """`reference.sample` without cuts into `token` (int64) and `logprob` (float32)."""
    mu, mus = (0.0, strength) if isinstance(strength, Tensor) else (strength, None)
    key, keys = (0, seed) if isinstance(seed, Tensor) else (seed, None)
    at, ats = (0, position) if isinstance(position, Tensor) else (position, None)
    _ops().sample(
        adapted, base, mu, mus, _log_alpha(alpha), penalty, temperature,
        key, keys, at, ats, token, logprob,
    )  # fmt: skip
