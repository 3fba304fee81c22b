"""The whole GPU story in one command: python benchmarks/gpu.py

Correctness on the device, CUDA graphs, bandwidth, the operators' speed and latency, the linear
layers of decode steps, the engine beside its rivals, other splits of the vocabulary,
compute-sanitizer: under eight minutes, into `benchmarks/results/<device>.json`, which is written
again after every section and often within one, so a kill loses little.

Sections run in a worker process. One that fails is recorded; one that crashes the process, poisons
the CUDA context or overruns is recorded too, and a fresh worker goes on with the next.
`--device cpu --quick` runs the plumbing of it all on a CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
for folder in (ROOT, HERE):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

TOTAL = 465.0  # seconds for everything; starting and stopping adds a few
GRACE = 25.0  # seconds over its budget after which a section is killed
POISONED = 17  # exit code of a worker whose device answers no more
BACKENDS = {"cuda": ("triton", "cuda"), "cpu": ("cpu", "reference")}


def sections(device: str) -> dict[str, tuple[str, float]]:
    """name -> (module:function, seconds), in the order in which a cut hurts least."""
    first, second = BACKENDS[device]
    return {
        "machine": ("gpu_measure:machine", 15),
        "bandwidth": ("gpu_measure:bandwidth", 15),
        f"correctness_{first}": ("gpu_correctness:section", 100),
        f"correctness_{second}": ("gpu_correctness:section", 45),
        "graph": ("gpu_graph:section", 25),
        "latency": ("gpu_speed:latency", 30),
        "operators": ("gpu_speed:operators", 110),
        "linear": ("gpu_linear:section", 40),
        "engine": ("gpu_engine:section", 170),
        "tiles": ("gpu_tiles:section", 40),
        "sanitizer": ("gpu_graph:sanitizer", 60),
    }


def table(result: Mapping[str, Any]) -> str:
    """The results file as Markdown tables."""
    return import_module("gpu_table").markdown(result)


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def save(path: Path, result: Mapping[str, Any]) -> None:
    """Whole or not at all; a line for each record, so that a new run is a readable diff."""
    write_text = import_module("svd_engine.files").write_text
    write_text(path, dump(tidy(result)) + "\n")


def tidy(value: Any) -> Any:
    """What JSON can hold: four digits, no NaN or infinity, no folder of this computer."""
    if isinstance(value, Mapping):
        return {str(key): tidy(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [tidy(inner) for inner in value]
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            return str(value)
        return float(f"{value:.4g}") if abs(value) < 1e6 else float(round(value))
    if isinstance(value, str):
        return value.replace(str(ROOT), ".").replace(f"{sys.prefix}/lib/", "")
    return value


def dump(value: Any, indent: str = "") -> str:
    inner = indent + "  "
    if isinstance(value, dict) and any(isinstance(x, dict | list) for x in value.values()):
        parts = [f"{inner}{json.dumps(key)}: {dump(x, inner)}" for key, x in value.items()]
    elif isinstance(value, list) and any(isinstance(x, dict | list) for x in value):
        parts = [f"{inner}{dump(x, inner)}" for x in value]
    else:
        return json.dumps(value)
    left, right = "{}" if isinstance(value, dict) else "[]"
    return left + "\n" + ",\n".join(parts) + f"\n{indent}{right}"


def words(error: BaseException) -> str:
    """The error, what caused it, and the innermost line of ours."""
    chain: list[BaseException] = [error]
    while len(chain) < 3 and (before := chain[-1].__cause__ or chain[-1].__context__):
        chain.append(before)
    text = " <- ".join(f"{type(x).__name__}: {str(x).strip()}"[:700] for x in chain)
    where, trace = "", error.__traceback__
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if ROOT in file.parents:
            where = f" ({file.name}:{trace.tb_lineno})"
        trace = trace.tb_next
    return text + where


class Run:
    """What a section gets: the device, its deadline, and a place for what it has so far."""

    def __init__(
        self, path: Path, name: str, device: str, quick: bool, seconds: float, end: float
    ) -> None:
        self.path, self.name, self.device, self.quick = path, name, device, quick
        self.backends = BACKENDS[device]
        self.start = time.time()
        self.deadline = min(self.start + seconds, end)
        self._kept = self.start

    def left(self) -> float:
        return self.deadline - time.time()

    def keep(self, partial: Any, every: float = 1.0) -> None:
        """Write what the section has so far, at most once in `every` seconds."""
        if time.time() - self._kept >= every:
            self.note(status="running", limit=self.deadline - self.start, result=partial)
            self._kept = time.time()

    def note(self, **entry: Any) -> None:
        result = load(self.path)
        seconds = time.time() - self.start
        result["sections"][self.name] = {"seconds": seconds, **entry}
        save(self.path, result)

    def before(self, name: str) -> dict[str, Any]:
        """The result of an earlier section, or nothing."""
        return load(self.path).get("sections", {}).get(name, {}).get("result") or {}


def work(
    path: Path,
    names: Sequence[str],
    budgets: Mapping[str, tuple[str | Callable[[Run], Any], float]],
    device: str,
    quick: bool,
    end: float,
) -> int:
    """Run sections one after the other in this process; the exit code."""
    for name in names:
        target, seconds = budgets[name]
        run = Run(path, name, device, quick, seconds, end)
        if run.left() < 3:
            run.note(status="skipped", skipped="time")
            continue
        run.note(status="running", limit=run.deadline - run.start)
        print(f"{name} ...", flush=True)
        try:
            if isinstance(target, str):
                module, _, function = target.partition(":")
                target = getattr(import_module(module), function)
            run.note(status="ok", result=target(run))
        except Exception as error:
            partial = run.before(name)
            run.note(status="error", error=words(error), result=partial)
        if device == "cuda" and (error := _poison()):
            entry = load(path)["sections"][name]
            run.note(**(entry | {"status": "error", "device": error}))
            return POISONED
    return 0


def _poison() -> str | None:
    """What the device says if it answers no more."""
    import torch

    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
        torch.cuda.empty_cache()
    except Exception as error:
        return words(error)
    return None


def drive(path: Path, names: Sequence[str], worker: Sequence[str], end: float) -> None:
    """Start workers until every section has its entry. `worker` gets names appended."""
    left = list(names)
    while left:
        environment = os.environ | {"PYTHONWARNINGS": "ignore"}
        with subprocess.Popen([*worker, *left], cwd=ROOT, env=environment) as process:
            why = _watch(process, path, end)
        entries = load(path)["sections"]
        done = [n for n in left if entries.get(n, {}).get("status", "running") != "running"]
        if len(done) < len(left) and (why or process.returncode not in (0, POISONED)):
            stopped = next(n for n in left if n not in done)
            result = load(path)
            why = why or f"the worker ended with exit code {process.returncode}"
            result["sections"][stopped] = {
                **result["sections"].get(stopped, {}), "status": "error", "error": why
            }  # fmt: skip
            save(path, result)
            done.append(stopped)
        if not done:  # a worker that does nothing and says that all is well
            break
        left = [n for n in left if n not in done]


def _watch(process: "subprocess.Popen[bytes]", path: Path, end: float) -> str | None:
    """Wait for a worker; why it had to be killed, or None."""
    current, since, limit = None, time.time(), 60.0
    while True:
        try:
            process.wait(timeout=0.25)
            return None
        except subprocess.TimeoutExpired:
            pass
        entries = load(path)["sections"]
        name = next((n for n, e in entries.items() if e["status"] == "running"), None)
        if name != current:
            current, since = name, time.time()
            limit = entries[name].get("limit", limit) if name else 60.0
        if time.time() > min(since + limit, end) + GRACE:
            process.kill()
            process.wait()
            return f"killed after {time.time() - since:.0f} s"


def device_name(device: str) -> str:
    """Asked in a process of its own: this one never opens the device. Exits if there is none."""
    if device == "cpu":
        return "cpu"
    code = "import torch; print(torch.cuda.get_device_name())"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if asked.returncode:
        last = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
        sys.exit(f"There is no CUDA device: {last}\n--device cpu --quick runs the plumbing.")
    return asked.stdout.strip().splitlines()[-1]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=BACKENDS, default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the plumbing")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>.json")
    parser.add_argument(
        "--only", action="append", metavar="SECTION", help="sections that begin with this"
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
        sys.exit(work(given.out, given.worker, known, given.device, given.quick, given.end))
    only = tuple(given.only or [""])
    names = [name for name in known if name.startswith(only)]
    if not names:
        parser.error(f"--only must begin one of {', '.join(known)}")
    name = device_name(given.device)
    folder = ROOT / ("runs" if given.device == "cpu" else "benchmarks/results")
    path = (given.out or folder / f"{name.replace(' ', '-')}.json").resolve()
    end = time.time() + TOTAL
    about = {
        "command": "python benchmarks/gpu.py"
        + (f" --device {given.device}" if given.device != "cuda" else "")
        + (" --quick" if given.quick else "")
        + "".join(f" --only {x}" for x in given.only or ()),
        "date": time.strftime("%Y-%m-%d"),
        "device": name,
    }
    # With --only, other sections of the same file stay, with their own date.
    before = load(path).get("sections", {}) if given.only else {}
    stay = {key: entry for key, entry in before.items() if key not in names}
    save(path, {**about, "sections": stay})
    worker = [sys.executable, str(HERE / "gpu.py"), "--device", given.device]
    worker += ["--quick"] if given.quick else []
    worker += ["--out", str(path), "--end", str(end), "--worker"]
    try:
        drive(path, names, worker, end)
    finally:
        result = load(path)
        result["seconds"] = TOTAL - (end - time.time())
        save(path, result)
        import_module("gpu_table").show(result)
        print(path.relative_to(ROOT) if ROOT in path.parents else path)


if __name__ == "__main__":
    main()
