"""Check and measure everything on a GPU: python -m benchmarks.gpu

Correctness on the device, CUDA graphs, bandwidth, the operators' speed and latency, the engine
beside its rivals, the linear layers of decode steps, other splits of the vocabulary,
compute-sanitizer: under eight minutes (`--seconds`), into `benchmarks/results/gpu.json`, which
is rewritten after every section and often within one, so a kill loses little.

Sections run in a worker process. A section that fails is recorded; so is one that crashes the
process, poisons the CUDA context or overruns, and a fresh worker continues with the next.
`--device cpu --quick` runs the plumbing on a CPU. Start it in the root of the repository;
svd_engine need not be installed.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.gpu import supervisor, tables, worker
from benchmarks.records import RESULTS, ROOT

COMMAND = "python -m benchmarks.gpu"


def sections(device: str) -> dict[str, tuple[str, float]]:
    """Map each section to (module:function, seconds), in the order in which a cut hurts least."""
    first, second = worker.BACKENDS[device]
    return {
        "machine": ("benchmarks.gpu.measure:machine", 15),
        "bandwidth": ("benchmarks.gpu.measure:bandwidth", 15),
        f"correctness_{first}": ("benchmarks.gpu.correctness:section", 95),
        f"correctness_{second}": ("benchmarks.gpu.correctness:section", 40),
        "graph": ("benchmarks.gpu.graph:section", 25),
        "latency": ("benchmarks.gpu.speed:latency", 20),
        "operators": ("benchmarks.gpu.speed:operators", 110),
        "engine": ("benchmarks.gpu.engine:section", 110),
        "linear": ("benchmarks.gpu.linear:section", 40),
        "step": ("benchmarks.gpu.step:section", 90),
        "tiles": ("benchmarks.gpu.tiles:section", 40),
        "sanitizer": ("benchmarks.gpu.graph:sanitizer", 60),
    }


def device_name(device: str) -> str:
    """Ask for the GPU's name in another process: this one never opens the device.

    Exits if there is none.
    """
    if device == "cpu":
        return "cpu"
    code = "import torch; print(torch.cuda.get_device_name())"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if asked.returncode:
        last = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
        sys.exit(f"There is no CUDA device: {last}\n--device cpu --quick runs the plumbing.")
    return asked.stdout.strip().splitlines()[-1]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=worker.BACKENDS, default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the plumbing")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu.json")
    parser.add_argument(
        "--only", action="append", metavar="SECTION", help="only sections that begin with this"
    )
    parser.add_argument(
        "--seconds", type=float, default=465.0, help="for everything; starting adds a few"
    )
    parser.add_argument("--worker", nargs="+", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--end", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    known = sections(given.device)
    if given.worker:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        if given.quick:
            os.environ["OMP_NUM_THREADS"] = "1"  # threads of tiny work wait for each other
        sys.exit(worker.work(given.out, given.worker, known, given.device, given.quick, given.end))
    only = tuple(given.only or [""])
    names = [name for name in known if name.startswith(only)]
    if not names:
        parser.error(f"--only must begin one of {', '.join(known)}")
    device = device_name(given.device)
    folder = ROOT / "runs" if given.device == "cpu" else RESULTS
    path = (given.out or folder / "gpu.json").resolve()
    options = ["--device", given.device] if given.device != "cuda" else []
    options += ["--quick"] if given.quick else []
    chosen = [word for section in given.only or () for word in ("--only", section)]
    # With --only, the other sections of the same file stay, each with its own date.
    before: dict[str, Any] = {"sections": {}}
    if given.only and path.exists():
        before = records.read(path)
    about = {
        "command": " ".join([COMMAND, *options, *chosen]),
        "date": time.strftime("%Y-%m-%d"),
        "device": device,
        "sections": {
            name: {"date": before["date"]} | entry
            for name, entry in before["sections"].items()
            if name not in names
        },
    }
    worker.save(path, about)
    end = time.time() + given.seconds
    command = [sys.executable, "-m", "benchmarks.gpu", *options]
    command += ["--out", str(path), "--end", str(end), "--worker"]
    try:
        supervisor.drive(path, names, command, end)
    finally:
        result = records.read(path)
        result["seconds"] = given.seconds - (end - time.time())
        worker.save(path, result)
        tables.show(result)
        print(path.relative_to(ROOT) if ROOT in path.parents else path)


if __name__ == "__main__":
    main()
