"""Every operator on a backend against float64 on the same device.

Cases, answers and tolerance are those of tests/ops. Run as a script it calls each operator on tiny
rows, for compute-sanitizer.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.gpu.worker import Run, words
from tests.ops.cases import (
    BF16,
    DIFFERENCE,
    INF,
    OPERATORS,
    Options,
    absent,
    cases,
    logits,
    options,
)
from tests.ops.oracle import Worst, WrongError, alone, check, same

Check = Callable[[str, str], Worst | None]  # of an operator on a backend


def _alone(vocab: int, dtype: torch.dtype, device: str) -> Check:
    def run(name: str, backend: str) -> None:
        z, b = logits(5, vocab, device, dtype)
        alone(name, backend, z, b, options(z, penalty=-1.0))

    return run


def _far(device: str) -> Check:
    """Rows 2^30 elements apart, so that the third begins beyond 2^31."""

    def run(name: str, backend: str) -> None:
        stride, vocab = 2**30 + 16, 1000
        _need(device, 2 * (2 * stride + vocab))
        buffer = torch.empty(2 * stride + vocab, dtype=BF16, device=device)
        far = buffer.as_strided((3, vocab), (stride, 1))
        z, b = logits(3, vocab, device, BF16)
        far.copy_(z)
        operate, o = OPERATORS[name].run, options(z)
        near = operate(z, b, o, backend, None)
        out = (
            far if name.removesuffix(DIFFERENCE) == "steer" else None
        )  # and the output is far as well
        for got, want in zip(operate(far, b, o, backend, out), near, strict=True):
            if not same(got, want):
                raise WrongError("rows 2^30 elements apart differ from the same rows side by side")

    return run


def _live(device: str, quick: bool) -> Check:
    """So many rows of real data that the last ones lie beyond 2^31 elements."""

    def run(name: str, backend: str) -> None:
        vocab = 100 if quick else 151936
        n = 50 if quick else 2**31 // vocab + 40
        _need(device, (4 if name.startswith("steering_vector") else 2) * n * vocab + 4 * n * vocab)
        z = torch.randn(n, vocab, dtype=BF16, device=device).mul_(3)
        b = torch.randn(n, vocab, dtype=BF16, device=device).mul_(3)
        rows = torch.arange(n, device=device)
        alone(name, backend, z, b, Options(rows * 7919 % vocab, rows + 3, rows * 5))

    return run


def _need(device: str, size: int) -> None:
    if device == "cuda" and torch.cuda.mem_get_info()[0] < size + (2 << 30):
        raise MemoryError(f"{size / 2**30:.0f} GiB are not free")


@cache
def _checks(device: str, quick: bool) -> dict[str, tuple[Check, frozenset[str]]]:
    """Map each case to its check and operators; the 64-bit offsets first."""
    everything = frozenset(OPERATORS)
    found: dict[str, tuple[Check, frozenset[str]]] = {}
    if not quick:
        found["64-bit offsets: rows 2^30 apart"] = _far(device), everything
    if device == "cuda" or quick:
        found["64-bit offsets: real rows"] = _live(device, quick), everything
    sizes = [(6000, torch.float32), (6001, torch.float32), (6000, BF16)]
    for vocab, dtype in sizes if quick else [*sizes, (151936, BF16)]:
        title = f"alone or in a batch, {str(dtype)[6:]}, V = {vocab}"
        found[title] = _alone(vocab, dtype, device), everything
    for case, asked in cases(device, quick):
        found[case.name] = partial(check, case=case), asked
    return found


def one(title: str, backend: str, device: str, quick: bool) -> dict[str, str | Worst]:
    """Map each operator to what was found on one case: a Worst, "ok", or what is wrong."""
    call, asked = _checks(device, quick)[title]
    found: dict[str, str | Worst] = {}
    for name in OPERATORS:
        if name not in asked or absent(name, backend, device) is not None:
            continue
        try:
            found[name] = call(name, backend) or "ok"
        except MemoryError as error:
            found[name] = f"skipped: {error}"
        except WrongError as error:
            found[name] = f"wrong: {error}"
        except Exception as error:
            found[name] = f"wrong: {words(error)}"
            if device == "cuda":
                torch.cuda.synchronize()  # raises where the device is lost: the case ends
    return found


def section(run: Run) -> dict[str, Any]:
    """A row a case: error over tolerance by operator, "ok" for what is equal, or what is wrong.

    On a GPU the cases are dealt out to processes, because Triton's compiler is what takes the time.
    """
    backend = run.backends[0] if run.name.endswith(run.backends[0]) else run.backends[1]
    missing = {name: absent(name, backend, run.device) for name in OPERATORS}
    rows: list[dict[str, Any]] = []
    worst: dict[str, dict[str, Any]] = {}
    late: list[str] = []
    result: dict[str, Any] = {
        "backend": backend,
        "absent": {name: why for name, why in missing.items() if why},
        "worst": worst,
        "failures": [],
        "cases": rows,
    }

    def note(title: str, found: dict[str, str | Worst]) -> None:
        row: dict[str, Any] = {"case": title}
        for name, said in found.items():
            what = said if isinstance(said, str) and said.startswith("wrong: ") else None
            row[name] = said.ratio if isinstance(said, Worst) else said
            if isinstance(said, Worst):
                if name not in worst or said.ratio > worst[name]["ratio"]:
                    worst[name] = {"case": title, **vars(said)}
                if said.ratio > 1:
                    what = f"error {said.error:.3g}, tolerance {said.tolerance:.3g}"
            if what:
                failure = {"case": title, "operator": name, "what": what.removeprefix("wrong: ")}
                result["failures"].append(failure)
        rows.append(row)
        result["compared"] = sum(len(row) - 1 for row in rows)
        run.keep(result)

    about = (backend, run.device, run.quick)
    titles = list(_checks(run.device, run.quick))
    if run.device != "cuda":
        for title in titles:
            if run.left() < 1:
                late.append(title)
            else:
                note(title, one(title, *about))
    else:
        _deal(run, titles, about, note, late)
    return result | ({"skipped: time": late} if late else {})


def _deal(
    run: Run,
    titles: Sequence[str],
    about: tuple[str, str, bool],
    note: Callable[[str, dict[str, str | Worst]], None],
    late: list[str],
) -> None:
    """Run the cases in as many processes as there are cores, up to twelve."""
    pool = ProcessPoolExecutor(
        max(1, min(12, (os.cpu_count() or 2) - 2)), mp_context=get_context("spawn")
    )
    asked = {pool.submit(one, title, *about): title for title in titles}
    try:
        for future in as_completed(asked, timeout=max(1.0, run.left())):
            title = asked.pop(future)
            try:
                note(title, future.result())
            except Exception as error:
                note(title, {name: f"wrong: {words(error)}" for name in OPERATORS})
    except TimeoutError:
        late += asked.values()
    finally:
        processes = list(pool._processes.values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes if late else ():
            process.kill()


def tiny() -> None:
    """Each operator of both backends on a few rows, with scalar and with wide accesses."""
    for vocab in (2301, 4608):
        for dtype in (torch.float32, BF16):
            z, b = logits(2, vocab, "cuda", dtype)
            for penalty in (-INF, -1.0):
                o = options(z, penalty=penalty)
                for backend in ("triton", "cuda"):
                    for name in OPERATORS:
                        if absent(name, backend, "cuda") is None:
                            OPERATORS[name].run(z, b, o, backend, None)
    torch.cuda.synchronize()


if __name__ == "__main__":
    tiny()
