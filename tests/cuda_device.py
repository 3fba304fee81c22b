"""Where the tests of the CUDA kernels run them: on a GPU, and without one on the CPU.

`csrc/cuda/on_cpu.h` runs the kernels thread by thread, so all but nvcc's code for the device and
the device itself is checked anywhere.
"""

import hashlib
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from svd_engine.ops import cuda

INF, NAN = math.inf, math.nan
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ULP = 2.0**-20  # the exponential of a GPU is good to a few float32 roundings
POISON = 12345.0
SOURCES = Path(__file__).parent.parent / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")
needs_library = pytest.mark.skipif(isinstance(cuda._load(), str), reason=str(cuda._load()))
needs_gpu = pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable()))


def compiled(source, *arguments):
    """A library that nvcc leaves to the host's C++ compiler, kept under build/."""
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


@pytest.fixture(scope="session")
def emulated():
    header, source = SOURCES / "cuda/on_cpu.h", SOURCES / "cuda/launch.cu"
    return cuda._bind(compiled(source, "-include", header))


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=needs_nvcc),
        pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu]),
    ]
)
def device(request, monkeypatch):
    """Where the kernels run; on "cpu" in their emulation."""
    threads = torch.get_num_threads()
    if request.param == "cpu":
        library = request.getfixturevalue("emulated")
        monkeypatch.setattr(cuda, "_library", lambda: library)
        monkeypatch.setattr(cuda, "_device_and_stream", lambda device: (0, 0))
        torch.set_num_threads(1)  # ten times as fast on small tensors and busy cores
    yield request.param
    torch.set_num_threads(threads)


def logits(n, vocab, device, dtype=F32, base_dtype=None, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, vocab, generator=generator) * spread
    b = z + torch.randn(n, vocab, generator=generator)
    return z.to(dtype).to(device), b.to(base_dtype or dtype).to(device)


def with_workspace(operator, z, *arguments):
    size = cuda.workspace_size(*z.shape)
    workspace = torch.full((size + 64,), NAN, device=z.device)
    workspace[size:] = POISON
    operator(z, *arguments, workspace=workspace)
    assert (workspace[size:] == POISON).all()


def assert_earned(kernel, reference32, truth, scale):
    """The kernel errs no more than plain float32, but for a rounding of `scale`."""
    kernel, reference32 = kernel.double(), reference32.double()
    assert torch.equal(kernel.isnan(), truth.isnan())
    assert torch.equal(kernel == -INF, truth == -INF)
    allowed = (reference32 - truth).abs() + ULP * scale
    assert ((kernel - truth).abs() <= allowed)[truth.isfinite()].all()
