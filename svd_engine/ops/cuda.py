"""The CUDA C++ kernels (csrc/cuda), if they were built.

The library is plain C and knows nothing of PyTorch: it gets pointers and a stream. Nothing is
loaded before the first use, and importing this module cannot fail. `svd_engine.ops` has checked the
arguments; nothing is read back from the device, so every call can be captured in a CUDA graph.
"""

import ctypes
import functools
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from svd_engine.kernels.arguments import Draw, Mask, PerRow, log_alpha

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# The functions of csrc/cuda/launch.cu: result and arguments.
_ROWS = [c_void_p, c_int64, c_int]  # data, stride, dtype
_INPUTS = [*_ROWS, *_ROWS, c_int64, c_int]  # adapted, base, N, V
# strengths, strength, log alpha, penalty, whether the direction is the difference
_STEERING = [c_void_p, c_float, c_float, c_float, c_int]
_CUTS = [c_int, c_float, c_float]  # top k, top p, log min p
_INTEGERS = [c_void_p, c_int64]  # one per row, one for all
_WHERE = [c_void_p, c_int, c_void_p]  # workspace, device, stream
_SIGNATURES = {
    "tile": (c_int, []),
    "tile_bytes": (c_int, []),
    "error": (c_char_p, [c_int]),
    "probe": (c_int, []),
    "steer": (c_int, [*_INPUTS, *_STEERING, *_ROWS, *_WHERE]),
    "steering_vector": (c_int, [*_INPUTS, c_int, *_ROWS, *_WHERE]),
    "sample": (
        c_int,
        [
            *_INPUTS, *_STEERING, c_float, *_CUTS, *_INTEGERS, *_INTEGERS, c_void_p, c_void_p,
            *_WHERE,
        ],
    ),
    "topk": (c_int, [*_INPUTS, *_STEERING, c_int, c_void_p, c_void_p, *_WHERE]),
    "score": (c_int, [*_INPUTS, *_STEERING, c_void_p, c_void_p, *_WHERE]),
    "project_strength": (c_int, [*_INPUTS, c_float, c_int, *[c_void_p] * 5, *_WHERE]),
    "support": (c_int, [*_INPUTS, c_float, c_int, c_void_p, c_int, *[c_void_p] * 8, *_WHERE]),
    "divergence": (c_int, [*_INPUTS, c_void_p, *_WHERE]),
}  # fmt: skip


def _bind(path: Path) -> SimpleNamespace:
    library, functions = ctypes.CDLL(str(path)), SimpleNamespace()
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, f"svd_cuda_{name}")
        function.restype, function.argtypes = result, arguments
        setattr(functions, name, function)
    functions.tile_tokens, functions.tile_floats = functions.tile(), functions.tile_bytes() // 4
    return functions


@functools.cache
def _load() -> SimpleNamespace | str:
    """Load the functions of the library, or return why there are none."""
    found = sorted(Path(__file__).parents[1].glob("_cuda*.so"))
    if not found:
        return "svd_engine._cuda was not built (see the output of pip install -v)"
    try:
        return _bind(found[0])
    except Exception as error:
        return f"{found[0].name} failed to load: {error}"


@functools.cache
def _library() -> SimpleNamespace:
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


def unavailable() -> str | None:
    """Return why the kernels cannot run here, or None if they can."""
    loaded = _load()
    if isinstance(loaded, str):
        return loaded
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    code = loaded.probe()
    return f"no kernel for this CUDA device: {loaded.error(code).decode()}" if code else None


def takes(device: str) -> bool:
    """Tell whether the kernels compute on tensors on this type of device."""
    return device == "cuda"


def workspace_size(rows: int, vocab: int) -> int:
    """Return how many float32 elements a call on `[rows, vocab]` needs as `workspace`."""
    library = _library()
    return rows * -(-vocab // library.tile_tokens) * library.tile_floats


def steering_vector(
    adapted: Tensor, base: Tensor, direction: str, out: Tensor, *, workspace: Tensor | None = None
) -> None:
    """Write `reference.steering_vector` to `out`, which may be float32 `adapted` or `base`.

    workspace, here and below: float32 `[workspace_size(N, V)]` or more, aligned to 16 bytes; it
    need not be initialised.
    """
    arguments = (direction == "difference", *_rows(out))
    _run("steering_vector", adapted, base, arguments, workspace)


def steer(
    adapted: Tensor, base: Tensor, mask: Mask, out: Tensor, *, workspace: Tensor | None = None
) -> None:
    """Write `reference.steer` to `out`, which may be `adapted` or `base` itself."""
    _run("steer", adapted, base, (*_steering(mask), *_rows(out)), workspace)


def sample(
    adapted: Tensor,
    base: Tensor,
    mask: Mask,
    draw: Draw,
    token: Tensor,
    logprob: Tensor,
    *,
    workspace: Tensor | None = None,
) -> None:
    """Write `reference.sample` to `token` (int64) and `logprob` (float32), contiguous."""
    noise = (*_per_row(draw.seed), *_per_row(draw.position))
    arguments = (*_steering(mask), draw.temperature, *draw.cuts, *noise, token, logprob)
    _run("sample", adapted, base, arguments, workspace)


def topk(
    adapted: Tensor,
    base: Tensor,
    mask: Mask,
    k: int,
    logprob: Tensor,
    token: Tensor,
    *,
    workspace: Tensor | None = None,
) -> None:
    """Write `reference.topk` to `logprob` (float32) and `token` (int64), contiguous `[N, k]`."""
    _run("topk", adapted, base, (*_steering(mask), k, logprob, token), workspace)


def score(
    adapted: Tensor,
    base: Tensor,
    mask: Mask,
    target: Tensor,
    logprob: Tensor,
    *,
    workspace: Tensor | None = None,
) -> None:
    """Write `reference.score` to contiguous float32 `logprob`; NaN if target is not in [0, V)."""
    _run("score", adapted, base, (*_steering(mask), target.contiguous(), logprob), workspace)


def project_strength(
    adapted: Tensor,
    base: Tensor,
    target: Tensor,
    alpha: float,
    direction: str,
    numerator: Tensor,
    gauss_newton: Tensor,
    newton: Tensor,
    in_support: Tensor,
    *,
    workspace: Tensor | None = None,
) -> None:
    """Write `reference.project_strength` to float32 and bool `[N]`; a target as in `score`."""
    outputs = (numerator, gauss_newton, newton, in_support)
    arguments = (log_alpha(alpha), direction == "difference", target.contiguous(), *outputs)
    _run("project_strength", adapted, base, arguments, workspace)


def support(
    adapted: Tensor,
    base: Tensor,
    target: Tensor,
    alpha: float,
    direction: str,
    capacity: int,
    *outputs: Tensor,
    workspace: Tensor | None = None,
) -> None:
    """Write `reference.support` to its eight fields, contiguous; a target as in `score`."""
    rest = target.contiguous(), capacity, *outputs
    arguments = (log_alpha(alpha), direction == "difference", *rest)
    _run("support", adapted, base, arguments, workspace)


def divergence(
    adapted: Tensor, base: Tensor, out: Tensor, *, workspace: Tensor | None = None
) -> None:
    """Write `reference.divergence` to `out` (float32), contiguous."""
    _run("divergence", adapted, base, (out,), workspace)


def _run(
    name: str, adapted: Tensor, base: Tensor, arguments: tuple[Any, ...], workspace: Tensor | None
) -> None:
    """Launch a kernel; it gets the address of each tensor among the arguments."""
    if len(adapted) == 0:
        return
    workspace = _workspace(adapted, workspace)
    function = getattr(_library(), name)
    own = (x.data_ptr() if isinstance(x, Tensor) else x for x in arguments)
    where = _device_and_stream(adapted.device)
    _check(function(*_inputs(adapted, base), *own, workspace.data_ptr(), *where))


def _device_and_stream(device: torch.device) -> tuple[int, int]:
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def _rows(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), _DTYPES[x.dtype]


def _inputs(adapted: Tensor, base: Tensor) -> tuple[int, ...]:
    return *_rows(adapted), *_rows(base), *adapted.shape


def _steering(mask: Mask) -> tuple[Any, ...]:
    return *_per_row(mask.strength), log_alpha(mask.alpha), mask.penalty, mask.is_difference


def _per_row(value: PerRow[Any]) -> tuple[Tensor | None, Any]:
    number, each = value
    return None if each is None else each.contiguous(), number


def _workspace(adapted: Tensor, given: Tensor | None) -> Tensor:
    size = workspace_size(*adapted.shape)
    if given is None:
        return torch.empty(size, dtype=torch.float32, device=adapted.device)
    assert given.dtype == torch.float32 and given.is_contiguous() and given.data_ptr() % 16 == 0
    assert given.numel() >= size, f"workspace: {given.numel()} elements, {size} needed"
    return given


def _check(code: int) -> None:
    if code:
        name = _library().error(code).decode()
        raise RuntimeError(f"the CUDA kernels of svd_engine failed: {name} ({code})")
