"""Where the operators run: every backend in every form in which this machine can run it.

`csrc/cuda/on_cpu.h` runs the CUDA kernels thread by thread, and Triton's interpreter those of
Triton, so all but the compilers' code for the device and the device itself is checked anywhere.
"""

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from svd_engine.kernels import reference
from svd_engine.ops import cpu, cuda, dispatch

from .cases import NAN, OPERATORS, TILE, Recipe
from .oracle import DEVICE, HOST, INTERPRETER, POISON, Slack

SOURCES = Path(__file__).parents[2] / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SMALL = 64  # tokens: many tiles in a short row


def patch(undo: contextlib.ExitStack, where: Any, name: str, value: Any) -> None:
    undo.callback(setattr, where, name, getattr(where, name))
    setattr(where, name, value)


@dataclass(frozen=True)
class Runner:
    """A backend as the operators are called on it, with `with runner.running():` around."""

    name: str
    backend: str
    why_not: Callable[[], str | None]  # the reason why it does not run here
    prepare: Callable[[contextlib.ExitStack], None]
    device: str = "cpu"
    slack: Slack = HOST
    tile: int = TILE
    slow: bool = False
    largest: int = 10**9  # vocabulary of those that are fixed
    # How many of five recipes it takes of those that are alike and of the others, which ones
    # depends on the operator.
    alike: int = 5
    others: int = 5
    bitwise: bool = True  # a row gives the same bits in any batch

    def __str__(self) -> str:
        return self.name

    @property
    def module(self) -> ModuleType:
        return import_module(dispatch.MODULES[self.backend])

    def has(self, operator: str) -> bool:
        """Whether the backend has an operator of `cases`."""
        module = reference if self.backend == "reference" else self.module
        _, registered, _, direction = OPERATORS[operator]
        directions = getattr(module, "DIRECTIONS", reference.DIRECTIONS)
        return hasattr(module, registered) and direction in directions

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Memory that an operator allocates begins as NaN, or as the largest integer."""
        with contextlib.ExitStack() as undo:
            filled = torch.are_deterministic_algorithms_enabled()
            undo.callback(torch.use_deterministic_algorithms, filled)
            torch.use_deterministic_algorithms(True, warn_only=True)
            undo.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)  # ten times as fast on small tensors and busy cores
            self.prepare(undo)
            yield

    def takes(self, recipe: Recipe, operator: str) -> bool:
        """Whether a case is one for this runner."""
        if operator not in recipe.operators or recipe.large > self.largest:
            return False
        if not self.has(operator):
            return False
        share = self.alike if recipe.alike else self.others
        if (recipe.alike or self.slow) and OPERATORS[operator].direction != "projected":
            share = min(share, 1)  # the direction changes one line of a kernel
        return (recipe.number + list(OPERATORS).index(operator)) % 5 < share


def _guarded(operator: Callable[..., None], size: Callable[[int, int], int]) -> Callable[..., None]:
    """The operator with a workspace that begins as NaN, and whose end it must leave alone."""

    @functools.wraps(operator)
    def run(adapted: torch.Tensor, *rest: Any, workspace: torch.Tensor | None = None) -> None:
        if workspace is None:
            least = size(*adapted.shape)
            workspace = torch.full((least + 64,), NAN, device=adapted.device)
            workspace[least:] = POISON
            operator(adapted, *rest, workspace=workspace)
            assert (workspace[least:] == POISON).all(), "written beyond the workspace"
        else:
            operator(adapted, *rest, workspace=workspace)

    return run


def _guard(undo: contextlib.ExitStack, module: ModuleType) -> None:
    for name in dispatch.OPERATORS:
        if hasattr(module, name):
            patch(undo, module, name, _guarded(getattr(module, name), module.workspace_size))


def _cpu(limit: str) -> Runner:
    def why_not() -> str | None:
        reason = cpu.unavailable()
        if reason is None and limit not in available():
            return f"this CPU has no {limit}"
        return reason

    def prepare(undo: contextlib.ExitStack) -> None:
        undo.callback(cpu.capability, cpu.capability())
        cpu.capability(limit)

    return Runner(f"cpu {limit}", "cpu", why_not, prepare)


@functools.cache
def available() -> tuple[str, ...]:
    """The instruction sets that this CPU has."""
    best = cpu.capability()
    found = tuple(x for x in cpu.CAPABILITIES if cpu.capability(x) == x)
    cpu.capability(best)
    return found


def _triton(tile: int) -> Runner:
    def why_not() -> str | None:
        return dispatch.unavailable("triton")

    def prepare(undo: contextlib.ExitStack) -> None:
        launch = import_module(dispatch.MODULES["triton"])
        patch(undo, launch, "TILE", tile)
        _guard(undo, launch)

    if not INTERPRETED:
        return Runner(
            "triton on a device",
            "triton",
            why_not,
            prepare,
            "cuda",
            DEVICE,
        )
    if tile == TILE:  # as a device has them, which adds little to what small ones show
        return Runner(
            "triton interpreted", "triton", why_not, prepare, slack=INTERPRETER, slow=True,
            largest=50257, alike=0, others=1,
        )  # fmt: skip
    return Runner(
        f"triton interpreted, tiles of {tile}", "triton", why_not, prepare, slack=INTERPRETER,
        tile=tile, slow=True, largest=0, alike=1, others=3,
    )  # fmt: skip


def compiled(source: Path, *arguments: Any) -> Path:
    """A library that nvcc leaves to the host's C++ compiler, kept under build/."""
    assert NVCC is not None
    common = ["-std=c++17", "-O2", "-shared", "-cudart", "none", "-Xcompiler", "-fPIC"]
    command = [NVCC, "-x", "c++", *common, *arguments, source]
    read = [source, *sorted(SOURCES.glob("*.h")), *sorted((SOURCES / "cuda").iterdir())]
    made_of = hashlib.sha256(str(command[:-1]).encode())
    for file in read:
        made_of.update(file.read_bytes())
    library = SOURCES.parent / f"build/emulated-{made_of.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", partial], check=True)
        partial.rename(library)
    return library


@functools.cache
def _emulated() -> Any:
    return cuda._bind(compiled(SOURCES / "cuda/launch.cu", "-include", SOURCES / "cuda/on_cpu.h"))


def _prepare_emulated(undo: contextlib.ExitStack) -> None:
    choose, library = dispatch.choose, _emulated()

    def chosen(*arguments: Any) -> ModuleType:
        """`choose`, uncached: for a while the backend takes tensors on the CPU."""
        return choose.__wrapped__(*arguments)  # type: ignore[attr-defined]

    patch(undo, cuda, "_library", lambda: library)
    patch(undo, cuda, "_device_and_stream", lambda device: (0, 0))
    patch(undo, cuda, "takes", lambda device: device == "cpu")
    patch(undo, dispatch, "choose", chosen)
    patch(undo, dispatch, "unavailable", lambda backend: None)
    _guard(undo, cuda)


def _nothing(undo: contextlib.ExitStack) -> None:
    pass


RUNNERS = [
    Runner("reference", "reference", lambda: None, _nothing, bitwise=False, largest=0, alike=0),
    *(_cpu(limit) for limit in cpu.CAPABILITIES[:3]),  # the next differs in linear layers only
    *map(_triton, (SMALL, TILE) if INTERPRETED else (TILE,)),
    Runner(
        "cuda emulated", "cuda", lambda: None if NVCC else "no nvcc", _prepare_emulated, slow=True
    ),
    Runner(
        "cuda on a device", "cuda", lambda: dispatch.unavailable("cuda"),
        lambda undo: _guard(undo, cuda), device="cuda", slack=DEVICE,
    ),
]  # fmt: skip
HERE = [runner for runner in RUNNERS if runner.why_not() is None]
