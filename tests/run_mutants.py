"""Break a copy of the program one line at a time and run the tests that must notice.

`python tests/run_mutants.py [word ...]` tries the mutants of which file or text holds a word, by
default all. It starts from a tree whose tests pass, prints what happened to each mutant, and exits
with 1 if one survived. Each of two processes has a copy, and runs pytest in forks that have the
slow imports behind them.
"""

import functools
import importlib
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import kernel_mutants
import pytest
from mutants import BY_FILE, Mutant, mutants

ROOT = Path(__file__).parents[1]
LEFT_OUT = (".git", ".venv", "build", "dist", "runs", "benchmarks/results", "__pycache__")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
PROCESSES = 2
LIMIT = 600  # seconds
CAUGHT, SURVIVED, SKIPPED, WRONG = "caught", "SURVIVED", "skipped", "WRONG"


def main(words: list[str]) -> int:
    os.environ |= {"TRITON_INTERPRET": "1", "PYTHONPATH": ".", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    for name in ("torch", "transformers", "transformers.models.llama", "peft", "hypothesis"):
        importlib.import_module(name)
    if importlib.util.find_spec("triton"):
        importlib.import_module("triton.language")
    every = mutants(BY_FILE, kernel_mutants.BY_FILE)
    chosen = [x for x in every if not words or any(w in f"{x.file} {x.text}" for w in words)]
    chosen.sort(key=is_compiled)  # last, because they leave a broken library behind
    fates: Counter[str] = Counter()
    fork = multiprocessing.get_context("fork")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(PROCESSES, mp_context=fork) as pool,
    ):
        tried = pool.map(functools.partial(attempt, folder=folder), chosen)
        for mutant, (fate, why, seconds) in zip(chosen, tried, strict=True):
            fates[fate] += 1
            print(f"{fate:8} {seconds:4.0f} s  {mutant.file}: {mutant.broken}: {why}", flush=True)
    print(", ".join(f"{count} {fate}" for fate, count in fates.items()))
    return int(fates[SURVIVED] + fates[WRONG] > 0)


def is_compiled(mutant: Mutant) -> bool:
    return mutant.file.startswith("csrc/cpu")


def attempt(mutant: Mutant, folder: str) -> tuple[str, str, float]:
    """Return what happened to a mutant, why, and in how many seconds."""
    start = time.monotonic()
    if "emulated" in mutant.tests and NVCC is None:
        return SKIPPED, "there is no nvcc", 0.0
    copy = Path(folder) / str(os.getpid()) / ROOT.name
    if not copy.exists():
        shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return *broken(mutant, copy), time.monotonic() - start


def broken(mutant: Mutant, copy: Path) -> tuple[str, str]:
    """Break the copy, run the tests there, and mend it."""
    file = copy / mutant.file
    whole = file.read_text(encoding="utf-8")
    if (count := whole.count(mutant.text)) != 1:
        return WRONG, f"its text occurs {count} times"
    file.write_text(whole.replace(mutant.text, mutant.broken), encoding="utf-8")
    try:
        if is_compiled(mutant):
            build(copy)
        return run(mutant, copy)
    finally:
        file.write_text(whole, encoding="utf-8")


def build(copy: Path) -> None:
    """Build the CPU extension in place."""
    subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=copy, check=True,
        env=os.environ | {"SVD_CUDA": "0", "SVD_STRICT_BUILD": "1"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip


def run(mutant: Mutant, copy: Path) -> tuple[str, str]:
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os.chdir(copy)
            sys.path[0] = str(copy)  # in place of this file's folder
            signal.alarm(LIMIT)
            code = pytest.main(["-xq", "-p", "no:cacheprovider", *shlex.split(mutant.tests)])
            sys.stdout.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == pytest.ExitCode.OK:
            return SURVIVED, mutant.tests
        output.seek(0)
        said = output.read()
        if code == -signal.SIGALRM:
            return WRONG, f"more than {LIMIT} s: {mutant.tests}"
        if code == pytest.ExitCode.TESTS_FAILED or code < 0:  # or it crashed
            return CAUGHT, said.rpartition("\nFAILED ")[2].split(" - ")[0].strip()[:120]
        return WRONG, f"{mutant.tests}\n{said[-2000:]}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
