"""The supervisor: starts workers until every section has its entry, whatever happens to them."""

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import records
from benchmarks.gpu.worker import POISONED, save
from benchmarks.records import ROOT

GRACE = 25.0  # seconds over its budget after which a section is killed


def drive(path: Path, names: Sequence[str], worker: Sequence[str], end: float) -> None:
    """Start workers until every section has its entry. `worker` gets names appended."""
    left = list(names)
    while left:
        environment = os.environ | {"PYTHONWARNINGS": "ignore"}
        with subprocess.Popen([*worker, *left], cwd=ROOT, env=environment) as process:
            why = _watch(process, path, end)
        entries = records.read(path)["sections"]
        done = [n for n in left if entries.get(n, {}).get("status", "running") != "running"]
        if len(done) < len(left) and (why or process.returncode not in (0, POISONED)):
            stopped = next(n for n in left if n not in done)
            why = why or f"the worker ended with exit code {process.returncode}"
            result = records.read(path)
            entry = result["sections"].get(stopped, {})
            result["sections"][stopped] = {**entry, "status": "error", "error": why}
            save(path, result)
            done.append(stopped)
        if not done:  # the worker did nothing and reported success
            break
        left = [n for n in left if n not in done]


def _watch(process: "subprocess.Popen[bytes]", path: Path, end: float) -> str | None:
    """Wait for a worker and return why it had to be killed, None if it ended by itself."""
    current, since, limit = None, time.time(), 60.0
    while True:
        try:
            process.wait(timeout=0.25)
            return None
        except subprocess.TimeoutExpired:
            pass
        entries = records.read(path)["sections"]
        name = next((n for n, e in entries.items() if e["status"] == "running"), None)
        if name != current:
            current, since = name, time.time()
            limit = entries[name].get("limit", limit) if name else 60.0
        if time.time() > min(since + limit, end) + GRACE:
            process.kill()
            process.wait()
            return f"killed after {time.time() - since:.0f} s"
