"""Every way to install or import the package, beside a stand-in for Hugging Face's `kernels`."""

import ctypes
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PROBE = (
    "import svd_engine.kernels.reference as r, svd_engine, sys; from svd_engine import ops;"
    "import transformers; assert 'kernels' not in sys.modules or sys.modules['kernels'].STAND_IN;"
    "print(svd_engine.__file__, ops.backends()['cpu'])"
)


def python(code, cwd, *path, **environment):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))} | environment
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=cwd, env=env, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def pip(*arguments, **environment):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    env = os.environ | environment
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """A distribution named `kernels` of the version that transformers asks for."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(
        "STAND_IN = True\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'): raise AttributeError(name)\n"
        "    return type(name, (), {'__init__': lambda self, *a, **k: None})\n"
    )
    info = folder / "kernels-0.18.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    (info / "RECORD").write_text("kernels/__init__.py,,\n")
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A clean copy of the tracked files, without anything built."""
    folder = tmp_path_factory.mktemp("checkout") / "svd-engine"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(os.readlink(source))
        elif source.is_file():
            target.write_bytes(source.read_bytes())
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    """The wheel of an sdist, made where no compiler works; with what pip said."""
    folder = tmp_path_factory.mktemp("wheel")
    code = f"import setuptools.build_meta as b; print(b.build_sdist({str(folder)!r}))"
    sdist = folder / python(code, checkout, CXX="/bin/false").splitlines()[-1]
    done = pip(
        "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", folder, sdist, CXX="/bin/false"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built, done.stdout + done.stderr


def test_raw_checkout(checkout, kernels, tmp_path):
    assert not (checkout / "kernels" / "__init__.py").exists()
    for cwd, path in ((checkout, []), (tmp_path, [checkout])):
        for beside in ([], [kernels]):
            told = python(PROBE, cwd, *path, *beside)
            assert str(checkout) in told and "not built" in told


def test_a_failed_native_build_is_one_line_and_no_failure(wheel):
    _, told = wheel
    lines = [line for line in told.splitlines() if "no native CPU kernels" in line]
    assert len(lines) == 1 and "pip install -v" in lines[0]


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel[0]).namelist()
    for name in (
        "kernels/reference.py", "kernels/launch.py", "py.typed", "cli/almanac.json",
        "explain/page.html", "explain/page.css", "explain/page.js",
    ):  # fmt: skip
        assert f"svd_engine/{name}" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"svd_engine"}


def test_installed_from_the_wheel(wheel, kernels, checkout, tmp_path):
    site = tmp_path / "site"
    assert pip("install", "--no-deps", "--target", site, wheel[0]).returncode == 0
    (tmp_path / "elsewhere").mkdir()
    for beside in ([], [kernels]):
        assert str(site) in python(PROBE, tmp_path / "elsewhere", site, *beside)
    # From the repository's root the checkout comes first, and works too.
    assert str(checkout) in python(PROBE, checkout, site, kernels)


def test_libraries_of_an_earlier_build_stay_out(checkout, tmp_path):
    old = tmp_path / "lib" / "svd_engine" / "_cuda.abi3.so"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"of an earlier build")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path / "lib"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (old.parent / "engine.py").is_file() and not old.exists()


def test_strict_build_fails(checkout, tmp_path):
    done = pip(
        "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, checkout,
        CXX="/bin/false", SVD_STRICT_BUILD="1", SVD_CUDA="0",
    )  # fmt: skip
    assert done.returncode != 0


def test_importing_needs_no_transformers_and_no_network():
    code = (
        "import socket; socket.socket.connect = None; import sys, svd_engine.ops; "
        "assert 'transformers' not in sys.modules; from svd_engine import SteeredEngine"
    )
    python(code, ROOT)


USES_NEW_GLIBC = """
#include <cmath>
#include <memory>
extern "C" double count_and_log(double x) {
  auto one = std::make_shared<double>(x), other = one;
  return other.use_count() == 2 ? std::log(*other) : 0;
}
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of x86-64 alone")
def test_a_wheel_asks_for_no_glibc_after_2_28(tmp_path):
    """What `make wheel` links in, with code that on a newer glibc would ask for a newer one."""
    if not shutil.which("g++") or not shutil.which("objdump"):
        pytest.skip("no g++ or objdump")
    (tmp_path / "code.cpp").write_text(USES_NEW_GLIBC)
    (line,) = re.findall(r"\$\(CC\) (.*glibc\.c) ", (ROOT / "Makefile").read_text())
    for command in (
        ["gcc", *line.split(), "-o", tmp_path / "glibc.o"],
        ["g++", "-O2", "-fPIC", "-c", tmp_path / "code.cpp", "-o", tmp_path / "code.o"],
        ["g++", "-shared", tmp_path / "code.o", tmp_path / "glibc.o", "-o", tmp_path / "code.so"],
    ):
        subprocess.run(command, cwd=ROOT, check=True)
    needed = subprocess.check_output(["objdump", "-T", tmp_path / "code.so"], text=True)
    versions = [tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_([\d.]+)", needed)]
    assert versions and max(versions) <= (2, 28), needed
    function = ctypes.CDLL(tmp_path / "code.so").count_and_log
    function.argtypes, function.restype = [ctypes.c_double], ctypes.c_double
    for x in (1e-300, 0.1, 0.75, 1.0, 1.5, 7.0, 1e300):
        assert function(x) == math.log(x)
    assert function(0.0) == -math.inf and math.isnan(function(-1.0))
