"""The operators' times, beside what one would write otherwise."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import STRENGTH, compiled, eager
from benchmarks.gpu.measure import Call, host_cost, l2_bytes, per_call, sets, synchronize
from benchmarks.gpu.worker import Run, words
from tests.ops.cases import BF16, DIFFERENCE, F32, OPERATORS, Options, absent

Make = Callable[[], list[Call]]
Measure = Callable[[], dict[str, Any]]
VOCABS, ROWS = (151936, 128256, 49152), (1, 1024, 32, 132, 4)
EVERYWHERE = ("steer", "sample greedy", "score")  # the others at the first vocabulary only
PEAKED = (*EVERYWHERE, "sample cut", "topk", "project_strength", "support", "divergence")
COMPILED = (1, 32, 1024)  # rows for which torch.compile is timed


def two_softmaxes(adapted: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    return adapted.softmax(-1), base.softmax(-1)


class Rows:
    """Buffer sets of one shape, enough that a round trip finds the L2 cold."""

    def __init__(
        self, run: Run, n: int, vocab: int, dtype: torch.dtype, peaked: bool = False
    ) -> None:
        """`peaked`: three tokens carry a row, as in a language model, instead of about twenty."""
        self.n, self.vocab, self.dtype, self.device = n, vocab, dtype, run.device
        self.peaked = peaked
        self.size = n * vocab * dtype.itemsize  # of one row set
        count = sets(run.device, 2 * self.size, run.quick)
        generator = torch.Generator(device=run.device).manual_seed(0)
        self.z: list[Tensor] = []
        self.b: list[Tensor] = []
        self.out: list[Tensor] = []
        for _ in range(count):
            base = torch.randn(n, vocab, device=run.device, generator=generator, dtype=dtype)
            noise = torch.randn(n, vocab, device=run.device, generator=generator, dtype=dtype)
            if peaked:
                likely = torch.randint(vocab, (n, 3), device=run.device, generator=generator)
                base.scatter_add_(1, likely, torch.full_like(base[:, :3], 12.0))
            else:
                base.mul_(3)
            self.b.append(base)
            self.z.append(noise.mul_(0.5).add_(base))
            self.out.append(torch.empty_like(base))
        rows = torch.arange(n, device=run.device)
        target = rows * 7919 % vocab
        self.options = Options(target, rows, rows, mu=STRENGTH, temperature=1.0)

    @property
    def about(self) -> dict[str, Any]:
        about = {"n": self.n, "vocab": self.vocab, "dtype": str(self.dtype)[6:]}
        return about | ({"rows": "peaked"} if self.peaked else {})

    def calls(self, name: str, backend: str) -> list[Call]:
        """Return one call per buffer set; `steer` writes into the set, the others allocate."""
        operate = OPERATORS[name].run
        return [
            partial(operate, z, b, self.options, backend, out if name.startswith("steer") else None)
            for z, b, out in zip(self.z, self.b, self.out, strict=True)
        ]

    def pairs(self, function: Callable[[Tensor, Tensor], object]) -> list[Call]:
        return [partial(function, z, b) for z, b in zip(self.z, self.b, strict=True)]

    def moved(self, name: str) -> int:
        """Return the bytes of the inputs, read once, and of outputs as wide as the vocabulary."""
        name = name.removesuffix(DIFFERENCE)
        written = {"steering_vector": self.n * self.vocab * 4}
        wide = ("steer", "eager formula", "torch.compile, cancelled form")
        return 2 * self.size + written.get(name, self.size if name in wide else 0)

    def times(self, name: str, calls: Sequence[Call]) -> dict[str, Any]:
        """Measure microseconds with the L2 cold, and with it hot if the rows fit."""
        moved = self.moved(name)
        seconds = per_call(self.device, calls)
        found = {"cold_us": seconds * 1e6, "bytes": moved, "GB/s": moved / seconds / 1e9}
        if len(calls) > 1 and 3 * self.size < 0.6 * l2_bytes(self.device):
            found["hot_us"] = per_call(self.device, [calls[0]] * 50) * 1e6
        return found


def _compiled(rows: Rows) -> list[Call]:
    return rows.pairs(compiled())


def _flashinfer(rows: Rows) -> list[Call]:
    from flashinfer.sampling import sampling_from_logits

    return [partial(sampling_from_logits, z) for z in rows.z]


def _contenders(run: Run, rows: Rows, first: bool) -> Iterator[tuple[str, str, Make | None]]:
    """Yield (name, backend, what makes the calls); None if the backend lacks the operator."""
    for name in OPERATORS if first else PEAKED if rows.peaked else EVERYWHERE:
        for backend in run.backends:
            missing = absent(name, backend, run.device)
            yield name, backend, None if missing else partial(rows.calls, name, backend)
    if first or rows.n == 1:
        yield "two softmaxes", "torch", partial(rows.pairs, two_softmaxes)
    if first:
        yield "eager formula", "torch", partial(rows.pairs, eager)


def operators(run: Run) -> dict[str, Any]:
    """Time every operator: by CUDA events around replays of a graph; on a CPU by the clock."""
    copy = run.before("bandwidth").get("GB/s")
    cases: list[dict[str, Any]] = []
    result: dict[str, Any] = {"copy GB/s": copy, "cases": cases, "skipped": []}

    def point(name: str, backend: str, rows: Rows, make: Make | None) -> None:
        about = {"name": name, "backend": backend, **rows.about}
        if run.left() < 2:
            result["skipped"].append({**about, "why": "time"})
            return
        if make is None:
            result["skipped"].append({**about, "why": "absent"})
            return
        try:
            found = rows.times(name, make())
            if copy:
                found["of copy"] = found["GB/s"] / copy
            cases.append(about | found)
        except Exception as error:
            cases.append(about | {"error": words(error)})
            synchronize(run.device)
        run.keep(result)

    vocabs, counts = ((500,), (1, 4)) if run.quick else (VOCABS, ROWS)
    for vocab, peaked in [(vocabs[0], True), *((vocab, False) for vocab in vocabs)]:
        for dtype in (BF16, F32):
            for n in counts:
                if run.left() < 2:
                    about = {"n": n, "vocab": vocab, "dtype": str(dtype)[6:]}
                    result["skipped"].append({"name": "all", **about, "why": "time"})
                    continue
                rows = Rows(run, n, vocab, dtype, peaked)
                for name, backend, make in _contenders(
                    run, rows, vocab == vocabs[0] and not peaked
                ):
                    point(name, backend, rows, make)
                del rows, make
    # Compiling takes seconds per shape, so it comes last.
    for dtype in (BF16, F32):
        for n in () if run.quick else COMPILED:
            if run.left() < 12:
                about = {"n": n, "vocab": vocabs[0], "dtype": str(dtype)[6:]}
                result["skipped"].append({"name": "torch.compile", **about, "why": "time"})
                continue
            rows = Rows(run, n, vocabs[0], dtype)
            name = "torch.compile, cancelled form"
            point(name, "torch", rows, partial(_compiled, rows))
            if run.device == "cuda" and dtype == F32 and find_spec("flashinfer"):
                point("sampling", "flashinfer", rows, partial(_flashinfer, rows))
            del rows
    return result


def latency(run: Run) -> dict[str, Any]:
    """Time one row: calls one after the other inside a graph, and the host's time per call."""
    vocab = 500 if run.quick else 151936
    graph: list[dict[str, Any]] = []
    host: list[dict[str, Any]] = []
    result = {"vocab": vocab, "in a graph": graph, "host": host}
    shown = ("steer", "sample greedy", "sample noisy")

    def record(into: list[dict[str, Any]], measure: Measure, **about: str) -> None:
        if run.left() < 1:
            into.append(about | {"skipped": "time"})
            return
        try:
            into.append(about | measure())
        except Exception as error:
            into.append(about | {"error": words(error)})
            synchronize(run.device)
        run.keep(result)

    count = 10 if run.quick else 200
    for dtype in (BF16, F32):
        rows = Rows(run, 1, vocab, dtype)
        named = {"two softmaxes": rows.pairs(two_softmaxes), "eager formula": rows.pairs(eager)}
        contenders = [(name, "torch", calls) for name, calls in named.items()] + [
            (name, backend, rows.calls(name, backend))
            for name in shown
            for backend in run.backends
            if absent(name, backend, run.device) is None
        ]
        for name, backend, calls in contenders:
            about = {"name": name, "backend": backend, "dtype": str(dtype)[6:]}
            record(graph, partial(rows.times, name, calls), **about)
            if dtype == BF16:
                record(host, partial(_host_micros, run.device, calls[0], count), **about)
    for name, call in _empty_calls(run).items():
        measure = partial(_host_micros, run.device, call, count)
        record(host, measure, name=name, backend="", dtype="")
    return result


def _host_micros(device: str, call: Call, count: int) -> dict[str, float]:
    return {"us": host_cost(device, call, count) * 1e6}


def _empty_calls(run: Run) -> dict[str, Call]:
    """Return the cheapest calls: what any call costs the host."""
    x = torch.zeros(1, device=run.device)
    calls: dict[str, Call] = {"torch: add_ on one element": lambda: x.add_(1)}
    if run.device == "cuda":
        from benchmarks.gpu.empty import nothing

        nothing[(1,)](x, num_warps=4)
        calls["Triton: an empty kernel"] = lambda: nothing[(1,)](x, num_warps=4)
    return calls
