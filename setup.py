"""Builds svd_engine._native, the CPU kernels in csrc/cpu; everything else is in pyproject.toml.

The package works without it, so nothing here fails an install: without torch to build against the
wheel is pure Python, and a compile that fails is one line of output. SVD_STRICT_BUILD=1 makes both
an error.
"""

import os
import sys
from glob import glob

from setuptools import setup

# GCC's notes on vectors as arguments, and a false alarm in its own AVX-512 header.
QUIET = ["-Wno-psabi", "-Wno-maybe-uninitialized"]
STRICT = os.environ.get("SVD_STRICT_BUILD") == "1"


def native() -> dict:
    """What setup() needs to build the extension; nothing without torch."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        return skip(error, "Install with --no-build-isolation beside torch to have them.")

    class Build(BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                skip(error, "See what the compiler said with pip install -v.")

    extension = CppExtension(
        "svd_engine._native",
        sources=sorted(glob("csrc/cpu/*.cpp")),
        depends=sorted(glob("csrc/*.h") + glob("csrc/cpu/*.h")),
        # The stable ABI of torch 2.10: the library loads in that version and any later one.
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", *QUIET],
        py_limited_api=True,
        optional=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


def skip(error: Exception, remedy: str) -> dict:
    if STRICT:
        raise error
    reason = str(error).splitlines()[0]
    print(
        f"svd_engine: no native CPU kernels, PyTorch will do ({reason}). {remedy}", file=sys.stderr
    )
    return {}


setup(**native())
