"""Measure on this machine and write benchmarks/results: python -m benchmarks.run [--quick]"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.records import RESULTS, ROOT

SUITES = {
    "cpu_operators": "kernels/test_operators.py",
    "cpu_start": "engine/test_start.py",
    "cpu_engine": "engine/test_engine.py",
    "cpu_step": "engine/test_step.py",
    "cpu_methods": "engine/test_methods.py",
    "cpu_speculation": "engine/test_speculation.py",
    "cpu_weights": "engine/test_weights.py",
    "cpu_serving": "serving/test_serving.py",
    "cpu_prefix": "engine/test_prefix.py",
    "cpu_levers": "engine/test_levers.py",
}
QUICK = "test_token or test_step or test_start or test_batch or host_overhead or 151936-1- "
QUICK += "or 151936-32-"
STATISTICS = ("median", "min", "iqr", "rounds")


def measure(suite: str, cases: str) -> dict[str, Any] | None:
    """Return what pytest-benchmark measured, None if the suite was skipped."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.json"
        command = [sys.executable, "-m", "pytest", f"benchmarks/{suite}", "-k", cases, "-rs"]
        subprocess.run([*command, f"--benchmark-json={path}"], cwd=ROOT, check=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return json.loads(text) if text else None


def trim(
    measured: Mapping[str, Any], command: str, versions: Mapping[str, str | None]
) -> dict[str, Any]:
    """Keep what a figure needs to be believed, and nothing that names this computer."""
    machines = {case["extra_info"].pop("machine") for case in measured["benchmarks"]}
    return {
        "command": command,
        "date": measured["datetime"][:10],
        "machine": "; ".join(sorted(machines)),
        "system": f"{measured['machine_info']['system']} {measured['machine_info']['machine']}",
        "versions": versions,
        "cases": [
            {
                "name": case["name"],
                "params": case["params"] or {},
                **{key: case["stats"][key] for key in STATISTICS},
                **case["extra_info"],
            }
            for case in measured["benchmarks"]
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="V = 151936, N = 1 and 32 only")
    parser.add_argument("--only", choices=SUITES, help="one suite instead of all")
    options = parser.parse_args()
    quick, only = options.quick, options.only
    command = "python -m benchmarks.run --quick" if quick else "make bench"
    if only:
        command = f"python -m benchmarks.run --only {only}"
    for name, suite in SUITES.items():
        if only not in (None, name):
            continue
        path = RESULTS / f"{name}.json"
        shown = path.relative_to(ROOT)
        measured = measure(suite, QUICK if quick else "")
        if measured is None:
            print(f"{name}: nothing was measured; {shown} is left as it is")
            continue
        records.write(path, trim(measured, command, records.installed()))
        print(f"{name}: {shown} is written")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
