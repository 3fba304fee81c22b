"""Every command of the benchmarks starts in a fresh process, in the repository alone."""

import os
import re
import subprocess
import sys

import pytest

from benchmarks.records import ROOT

pytestmark = pytest.mark.slow

COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for path in (ROOT / "benchmarks").rglob("*.py")
    if "ArgumentParser(" in path.read_text(encoding="utf-8")
)


def python(*arguments):
    """Run Python without pytest's path, in the root of the repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_these_are_the_commands():
    assert COMMANDS == [
        f"benchmarks.{name}" for name in ("gpu", "gpu.predict", "quality", "report", "run", "vllm")
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_comes_without_torch(name):
    ran = python("-X", "importtime", "-m", name, "--help")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(f"usage: python -m {name} ")
    imported = re.findall(r"\|\s*(\w+)$", ran.stderr, re.MULTILINE)
    assert "argparse" in imported
    assert not {"torch", "transformers", "numpy", "matplotlib"} & set(imported)


def test_the_experiments_are_what_quality_names():
    code = "from benchmarks.quality import __main__ as m, experiments as e; "
    ran = python("-c", code + "print(all(callable(getattr(e, n)) for n in m.COMMANDS))")
    assert ran.stdout == "True\n", ran.stderr
