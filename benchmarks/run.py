"""Measure on this machine and write benchmarks/results: python -m benchmarks.run [--quick]"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import svd_engine
from svd_engine.utils.files import write_text

ROOT = Path(__file__).resolve().parents[1]
SUITES = {
    "cpu_operators": "test_operators.py",
    "cpu_start": "test_start.py",
    "cpu_engine": "test_engine.py",
}
QUICK = "test_token or test_start or test_batch or host_overhead or 151936-1- or 151936-32-"


def measure(suite: str, cases: str) -> dict | None:
    """What pytest-benchmark measured; None where the suite was skipped."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.json"
        command = [sys.executable, "-m", "pytest", f"benchmarks/{suite}", "-k", cases, "-rs"]
        subprocess.run([*command, f"--benchmark-json={path}"], cwd=ROOT, check=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return json.loads(text) if text else None


def trim(measured: dict, command: str, versions: dict[str, str]) -> dict:
    """What a figure needs to be believed, and nothing that names this computer."""
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
                **{key: case["stats"][key] for key in ("median", "min", "iqr", "rounds")},
                **case["extra_info"],
            }
            for case in measured["benchmarks"]
        ],
    }


def digits(value):
    """Floats to four significant digits."""
    if isinstance(value, dict):
        return {key: digits(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [digits(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def to_json(result: dict) -> str:
    """A line a case, so that a new measurement is a readable diff."""
    head = json.dumps(result | {"cases": None}, indent=2)
    cases = ",\n".join("    " + json.dumps(digits(case)) for case in result["cases"])
    return head.replace('"cases": null', f'"cases": [\n{cases}\n  ]') + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="V = 151936, N = 1 and 32 only")
    quick = parser.parse_args().quick
    command = "python -m benchmarks.run --quick" if quick else "make bench"
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    versions["svd-engine"] = svd_engine.__version__
    for name, suite in SUITES.items():
        measured = measure(suite, QUICK if quick else "")
        if measured is None:
            print(f"{name}: nothing was measured; benchmarks/results/{name}.json is left as it is")
            continue
        write_text(
            ROOT / "benchmarks" / "results" / f"{name}.json",
            to_json(trim(measured, command, versions)),
        )
        print(f"{name}: benchmarks/results/{name}.json is written")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
