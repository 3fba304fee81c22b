"""Builds svd_engine._cpu (csrc/cpu) and svd_engine._cuda (csrc/cuda); see pyproject.toml.

The package works without both, so nothing here fails an install: without torch to build against
there are no CPU kernels, without nvcc no CUDA kernels, and a compile that fails is one line of
output. SVD_STRICT_BUILD=1 makes all but a missing nvcc an error. No GPU is asked for.

SVD_CUDA=0 leaves the CUDA kernels out; SVD_CUDA_ARCHS="80 90 100" says for which GPUs they are (of
the last one also as PTX, which later GPUs can run).
"""

import os
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.modified import newer_group

BuildExtension: Any = build_ext
no_torch: ImportError | None = None
try:
    from torch.utils import cpp_extension
except ImportError as error:
    no_torch = error
else:
    BuildExtension = cpp_extension.BuildExtension

# GCC's notes on vectors as arguments, and a false alarm in its own AVX-512 header.
QUIET = ["-Wno-psabi", "-Wno-maybe-uninitialized"]
STRICT = os.environ.get("SVD_STRICT_BUILD") == "1"
CUDA_BIN = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=CUDA_BIN)
ARCHS = os.environ.get("SVD_CUDA_ARCHS", "80 90 100").replace(",", " ").split()


def skip(kernels: str, error: Exception, remedy: str) -> None:
    if STRICT:
        raise error
    reason = str(error).splitlines()[0]
    print(f"svd_engine: no native {kernels} kernels ({reason}). {remedy}", file=sys.stderr)


class Build(BuildExtension):
    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:
            skip("CPU", error, "See what the compiler said with pip install -v.")

    def build_extension(self, extension: Extension) -> None:
        if extension.name != "svd_engine._cuda":
            super().build_extension(extension)
            return
        try:
            library = compile_cuda(extension.depends)
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, target)
        except Exception as error:
            skip("CUDA", error, "See what nvcc said with pip install -v, or set SVD_CUDA=0.")


class Modules(build_py):
    def run(self) -> None:
        # What an earlier build left there would go into the wheel: `build` does not clean up.
        for library in Path(self.build_lib, "svd_engine").glob("_c*.so"):
            library.unlink()
        super().run()


def compile_cuda(sources: list[str]) -> Path:
    """The library of csrc/cuda: plain C, tied to no version of torch or Python."""
    library = Path("build") / f"cuda-{'-'.join(ARCHS)}.so"
    if not newer_group(sources, library):
        return library
    library.parent.mkdir(exist_ok=True)
    partial = library.with_suffix(".partial")
    codes = [(arch, f"sm_{arch}") for arch in ARCHS] + [(ARCHS[-1], f"compute_{ARCHS[-1]}")]
    assert NVCC is not None
    command = [
        NVCC, "-O3", "-std=c++17", "-shared", "-cudart", "static", "--threads", "0",
        "-prec-div=false",  # 2 ulp will do, and Triton divides alike
        "-fmad=false",  # where nvcc fuses depends on the kernel, and the bits on that
        "-Xcompiler", "-fPIC,-fvisibility=hidden",
        *(f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes),
        "csrc/cuda/launch.cu", "-o", str(partial),
    ]  # fmt: skip
    if subprocess.run(command).returncode:
        raise RuntimeError("nvcc failed")
    return partial.rename(library)


def cpu_extension() -> Extension | None:
    if no_torch is not None:
        skip("CPU", no_torch, "Install with --no-build-isolation beside torch to have them.")
        return None
    return cpp_extension.CppExtension(
        "svd_engine._cpu",
        sources=sorted(glob("csrc/cpu/*.cpp")),
        depends=sorted(glob("csrc/*.h") + glob("csrc/cpu/*.h")),
        # The stable ABI of torch 2.10: the library loads in that version and any later one.
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", *QUIET],
        py_limited_api=True,
        optional=True,
    )


def cuda_extension() -> Extension | None:
    if os.environ.get("SVD_CUDA") == "0":
        return None
    if NVCC is None:
        print(f"svd_engine: no CUDA kernels (no nvcc on PATH or in {CUDA_BIN})", file=sys.stderr)
        return None
    # The sources are dependencies: torch's build refuses a .cu where torch itself has no CUDA.
    depends = ["setup.py", *sorted(glob("csrc/*.h") + glob("csrc/cuda/*"))]
    return Extension(
        "svd_engine._cuda", sources=[], depends=depends, py_limited_api=True, optional=True
    )


extensions = [extension for extension in (cuda_extension(), cpu_extension()) if extension]
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": Build, "build_py": Modules},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if extensions else {},
)
