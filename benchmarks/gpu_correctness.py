"""Every operator on a backend against float64 on the same device.

The tolerance is earned: |kernel - float64| <= |float32 PyTorch - float64| + 2^-20 of the row.
Run as a script it calls each operator on tiny rows, for compute-sanitizer.
"""

from collections.abc import Callable
from typing import Any

import torch
from gpu import Run, words
from gpu_cases import BF16, INF, OPERATORS, Case, Options, absent, cases, logits, options
from torch import Tensor

from svd_engine import ops

ULP = 2.0**-20  # the exponential of a GPU is good to a few float32 roundings
SAMPLERS = ("sample greedy", "sample noisy", "sample cut")


class WrongError(Exception):
    """What is not as the reference has it."""


class Worst:
    """The greatest error over its tolerance of what was compared."""

    def __init__(self) -> None:
        self.ratio = self.error = self.tolerance = 0.0

    def compare(self, what: str, got: Tensor, plain: Tensor, truth: Tensor, scale: Tensor) -> None:
        """got: the kernel's; plain: float32 PyTorch's; truth: float64's. scale: `[N, 1]`."""
        if got.shape != truth.shape:
            raise WrongError(f"{what} has shape {list(got.shape)}, not {list(truth.shape)}")
        got, plain, truth = (x.double().reshape(len(scale), -1) for x in (got, plain, truth))
        if not torch.equal(got.isnan(), truth.isnan()):
            raise WrongError(f"{what}: NaN in rows {_rows(got.isnan() != truth.isnan())}")
        wrong = got.isinf() != plain.isinf()
        wrong |= got.isinf() & (got != plain)
        if wrong.any():
            raise WrongError(f"{what}: infinities differ in rows {_rows(wrong)}")
        finite = got.isfinite() & plain.isfinite() & truth.isfinite()
        if not finite.any():
            return
        error = torch.where(finite, (got - truth).abs(), 0.0)
        tolerance = torch.where(finite, (plain - truth).abs() + ULP * scale, 1.0)
        ratio = error / tolerance
        at = ratio.argmax()
        if float(ratio.flatten()[at]) > self.ratio:
            self.ratio = float(ratio.flatten()[at])
            self.error, self.tolerance = float(error.flatten()[at]), float(tolerance.flatten()[at])


def _rows(wrong: Tensor) -> list[int]:
    return wrong.any(-1).nonzero().flatten().tolist()[:8]


def _scale(z: Tensor, b: Tensor, o: Options) -> Tensor:
    """`[N, 1]`: how large the numbers are that a row's result is made of."""
    wide = z.double()
    mu = torch.as_tensor(o.mu, device=z.device).abs().double()
    difference = (wide - b.double()).nan_to_num(0, 0, 0).abs().amax(-1)
    scale = wide.nan_to_num(0, 0, 0).abs().amax(-1) + torch.clamp(mu, min=1.0) * difference + 1
    return (scale - mu * o.penalty if o.penalty > -INF else scale)[:, None]


def check(name: str, backend: str, case: Case) -> Worst:
    """One operator on one case. Raises WrongError."""
    _, z, b, o = case
    run, worst = OPERATORS[name].run, Worst()
    out = torch.full(z.shape, 12345.0, device=z.device) if name == "steer" else None
    got = run(z, b, o, backend, out)
    plain = run(z.float(), b.float(), o, "reference", None)
    if len(z) == 0:
        shapes = [[list(x.shape) for x in y] for y in (got, plain)]
        if shapes[0] != shapes[1]:
            raise WrongError(f"shapes {shapes[0]}, not {shapes[1]}")
        return worst
    wide, scale = (z.double(), b.double()), _scale(z, b, o)
    if name in SAMPLERS:
        _tokens_equal("token", got[0], plain[0])
        truth = ops.score(
            *wide, o.mu, got[0].clamp(min=0), alpha=o.alpha, penalty=o.penalty, backend="reference"
        )
        worst.compare("logprob", got[1], plain[1], truth, scale)
        return worst
    truth = run(*wide, o, "reference", None)
    if name == "topk":
        _tokens_equal("token", got[1], plain[1])
        worst.compare("logprob", got[0], plain[0], truth[0], scale)
    elif name == "project_strength":
        for what, order, column in zip(
            ("numerator", "gauss_newton", "newton"), (1, 2, 2), range(3), strict=True
        ):
            worst.compare(what, got[column], plain[column], truth[column], scale**order)
        _tokens_equal("in_support", got[3], plain[3])
    else:
        worst.compare(name, got[0], plain[0], truth[0], scale)
    if name == "steer":
        narrow = run(z, b, o, backend, None)[0]
        rounded = got[0].to(z.dtype)
        if narrow.dtype != z.dtype or not _same(narrow, rounded):
            raise WrongError(f"in {z.dtype} it is not the float32 result, rounded")
    return worst


def _tokens_equal(what: str, got: Tensor, want: Tensor) -> None:
    if got.shape != want.shape or got.dtype != want.dtype:
        raise WrongError(
            f"{what} is {got.dtype} {list(got.shape)}, not {want.dtype} {list(want.shape)}"
        )
    if not torch.equal(got, want):
        rows = _rows((got != want).reshape(len(got), -1))
        raise WrongError(
            f"{what} in rows {rows}: {got[rows[0]].tolist()}, not {want[rows[0]].tolist()}"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    """To the bit, but for what a NaN carries."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def alone(name: str, backend: str, z: Tensor, b: Tensor, o: Options) -> None:
    """A row gives the same bits in a batch and alone. Raises WrongError."""
    run = OPERATORS[name].run
    together = run(z, b, o, backend, None)
    for i in sorted({0, 1, len(z) - 1}):
        single = run(z[i : i + 1], b[i : i + 1], o.row(i), backend, None)
        for got, want in zip(single, together, strict=True):
            if not _same(got[0].double(), want[i].double()):
                raise WrongError(f"row {i} alone differs from the same row in a batch of {len(z)}")


def _alone(vocab: int, dtype: torch.dtype, device: str) -> Callable[[str, str], None]:
    def run(name: str, backend: str) -> None:
        z, b = logits(5, vocab, device, dtype)
        alone(name, backend, z, b, options(z, penalty=-1.0))

    return run


def _far(device: str) -> Callable[[str, str], None]:
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
        out = far if name == "steer" else None  # and the output is far as well
        for got, want in zip(operate(far, b, o, backend, out), near, strict=True):
            if not _same(got, want):
                raise WrongError("rows 2^30 elements apart differ from the same rows side by side")

    return run


def _live(device: str, quick: bool) -> Callable[[str, str], None]:
    """So many rows of real data that the last ones lie beyond 2^31 elements."""

    def run(name: str, backend: str) -> None:
        vocab = 100 if quick else 151936
        n = 50 if quick else 2**31 // vocab + 40
        _need(device, (4 if name == "steering_vector" else 2) * n * vocab + 4 * n * vocab)
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

    def each(case: str, call: Callable[[str], Worst | None]) -> None:
        if run.left() < 1:
            result.setdefault("skipped: time", []).append(case)
            return
        row: dict[str, Any] = {"case": case}
        rows.append(row)
        for name in names:
            row[name] = "running"
            run.keep(result)
            try:
                found = call(name)
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

    for case in cases(run.device, run.quick):
        each(case.name, lambda name, case=case: check(name, backend, case))
    sizes = [(6000, torch.float32), (6001, torch.float32), (6000, BF16)]
    for vocab, dtype in sizes if run.quick else [*sizes, (151936, BF16)]:
        call = _alone(vocab, dtype, run.device)
        title = f"alone or in a batch, {str(dtype)[6:]}, V = {vocab}"
        each(title, lambda name, call=call: call(name, backend))
    if not run.quick:
        far = _far(run.device)
        each("64-bit offsets: rows 2^30 apart", lambda name: far(name, backend))
    if run.device == "cuda" or run.quick:
        live = _live(run.device, run.quick)
        each("64-bit offsets: real rows", lambda name: live(name, backend))
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
