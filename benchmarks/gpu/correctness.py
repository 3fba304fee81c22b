"""Every operator on a backend against float64 on the same device.

Cases, answers and tolerance are those of tests/ops. Run as a script it calls each operator on tiny
rows, for compute-sanitizer.
"""

from collections.abc import Callable, Sequence
from functools import partial
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


def section(run: Run) -> dict[str, Any]:
    """A row a case: error over tolerance by operator, "ok" for what is equal, or what is wrong."""
    backend = run.backends[0] if run.name.endswith(run.backends[0]) else run.backends[1]
    missing = {name: absent(name, backend, run.device) for name in OPERATORS}
    names = [name for name in OPERATORS if missing[name] is None]
    rows: list[dict[str, Any]] = []
    worst: dict[str, dict[str, Any]] = {}
    result: dict[str, Any] = {
        "backend": backend,
        "absent": {name: why for name, why in missing.items() if why},
        "worst": worst,
        "failures": [],
        "cases": rows,
    }

    def each(case: str, call: Check, names: Sequence[str] = names) -> None:
        if run.left() < 1:
            result.setdefault("skipped: time", []).append(case)
            return
        row: dict[str, Any] = {"case": case}
        rows.append(row)
        for name in names:
            row[name] = "running"
            run.keep(result)
            try:
                found = call(name, backend)
                row[name] = "ok" if found is None else found.ratio
                if found and (name not in worst or found.ratio > worst[name]["ratio"]):
                    worst[name] = {"case": case, **vars(found)}
                if found and found.ratio > 1:
                    raise WrongError(f"error {found.error:.3g}, tolerance {found.tolerance:.3g}")
            except MemoryError as error:
                row[name] = f"skipped: {error}"
            except Exception as error:
                row[name] = str(error) if isinstance(error, WrongError) else words(error)
                failure = {"case": case, "operator": name, "what": row[name]}
                result["failures"].append(failure)
                if run.device == "cuda":
                    torch.cuda.synchronize()  # raises where the device is lost: the section ends

    for case, asked in cases(run.device, run.quick):
        here = [name for name in names if name in asked]
        each(case.name, partial(check, case=case), here)
    sizes = [(6000, torch.float32), (6001, torch.float32), (6000, BF16)]
    for vocab, dtype in sizes if run.quick else [*sizes, (151936, BF16)]:
        title = f"alone or in a batch, {str(dtype)[6:]}, V = {vocab}"
        each(title, _alone(vocab, dtype, run.device))
    if not run.quick:
        each("64-bit offsets: rows 2^30 apart", _far(run.device))
    if run.device == "cuda" or run.quick:
        each("64-bit offsets: real rows", _live(run.device, run.quick))
    result["compared"] = sum(len(row) - 1 for row in rows)
    return result


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
