"""A worker: sections run one after the other in one process and note what they find."""

import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.records import ROOT

POISONED = 17  # exit code of a worker whose device no longer answers
BACKENDS = {"cuda": ("triton", "cuda"), "cpu": ("cpu", "reference")}


def save(path: Path, result: Mapping[str, Any]) -> None:
    records.write(path, records.plain(result))


def words(error: BaseException) -> str:
    """Describe the error, its causes, and the innermost line of this repository."""
    chain: list[BaseException] = [error]
    while len(chain) < 3 and (before := chain[-1].__cause__ or chain[-1].__context__):
        chain.append(before)
    text = " <- ".join(f"{type(x).__name__}: {str(x).strip()}"[:700] for x in chain)
    where, trace = "", error.__traceback__
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if ROOT in file.parents:
            where = f" ({file.relative_to(ROOT)}:{trace.tb_lineno})"
        trace = trace.tb_next
    return text + where


class Run:
    """The device and the deadline of one section, and the file that holds its results."""

    def __init__(
        self, path: Path, name: str, device: str, quick: bool, seconds: float, end: float
    ) -> None:
        self.path, self.name, self.device, self.quick = path, name, device, quick
        self.backends = BACKENDS[device]
        self.start = time.time()
        self.deadline = min(self.start + seconds, end)
        self._kept = self.start

    def left(self) -> float:
        """Return the seconds before the deadline."""
        return self.deadline - time.time()

    def keep(self, partial: Any, every: float = 1.0) -> None:
        """Write the partial result, at most once in `every` seconds."""
        if time.time() - self._kept >= every:
            self.note(status="running", limit=self.deadline - self.start, result=partial)
            self._kept = time.time()

    def note(self, **entry: Any) -> None:
        """Write the section's entry."""
        result = records.read(self.path)
        seconds = time.time() - self.start
        result["sections"][self.name] = {"seconds": seconds, **entry}
        save(self.path, result)

    def before(self, name: str) -> dict[str, Any]:
        """Return the result of an earlier section, empty if there is none."""
        return records.read(self.path)["sections"].get(name, {}).get("result") or {}


def work(
    path: Path,
    names: Sequence[str],
    budgets: Mapping[str, tuple[str | Callable[[Run], Any], float]],
    device: str,
    quick: bool,
    end: float,
) -> int:
    """Run sections one after the other in this process and return its exit code.

    `budgets` maps a name to (function or "module:function", seconds).
    """
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
        if device == "cuda" and (lost := _poison()):
            entry = records.read(path)["sections"][name]
            run.note(**(entry | {"status": "error", "device": lost}))
            return POISONED
    return 0


def _poison() -> str | None:
    """Return the device's error if it no longer answers."""
    import torch

    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
        torch.cuda.empty_cache()
    except Exception as error:
        return words(error)
    return None
