"""CUDA graphs, streams and compute-sanitizer."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.measure import capture
from benchmarks.gpu.worker import Run, words
from benchmarks.records import ROOT
from svd_engine.kernels.arguments import Mask
from svd_engine.ops import checks, dispatch
from tests.ops.cases import BF16, INF, OPERATORS, Options, absent, logits, options

VOCAB = 50257


def section(run: Run) -> dict[str, Any]:
    """Map each backend and each attempt to "ok" or what went wrong."""
    if run.device != "cuda":
        return {"skipped": "needs a CUDA device"}
    result: dict[str, Any] = {}
    tries: dict[str, Callable[[str], str]] = {
        "positions from the device, 8 replays": positions,
        "no allocation with a workspace": no_allocation,
        "two graphs on two streams at once": two_streams,
    }
    for backend in run.backends:
        found = result[backend] = {}
        for name in OPERATORS:
            missing = absent(name, backend, "cuda")
            found[f"replay of {name}"] = "absent" if missing else _tried(run, replay, name, backend)
        for title, call in tries.items():
            found[title] = _tried(run, call, backend)
        run.keep(result)
    return result


def _tried(run: Run, call: Callable[..., str], *arguments: str) -> str:
    if run.left() < 1:
        return "skipped: time"
    try:
        said = call(*arguments)
        torch.cuda.synchronize()
        return said
    except Exception as error:
        text = words(error)
        torch.cuda.synchronize()  # raises if the device is lost, which ends the section
        return text


def _equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(
        torch.equal(g.double().nan_to_num(7.0), w.double().nan_to_num(7.0))
        for g, w in zip(got, want, strict=True)
    )


def replay(name: str, backend: str) -> str:
    """Check that a captured call follows its inputs: logits, strengths, seeds, targets."""
    z, b = logits(4, VOCAB, "cuda", BF16)
    o = options(z, mu=torch.full((4,), 2.0, device="cuda"))
    operate = OPERATORS[name].run
    kept: list[Tensor] = []

    def call() -> None:
        kept[:] = operate(z, b, o, backend, None)

    graph = capture([call])
    captured = tuple(kept)  # the graph's own outputs, as long as they are referenced
    for change in range(3):
        fresh = torch.randn(4, VOCAB, device="cuda", generator=_generator(change)) * 3
        z.copy_(fresh)
        b.copy_(fresh.roll(1, 0))
        for x in (o.mu, o.seed, o.position, o.target):
            assert isinstance(x, Tensor)
            x.add_(1)
        graph.replay()
        torch.cuda.synchronize()
        if not _equal(captured, operate(z, b, o, backend, None)):
            return f"replay {change} differs from the eager call"
    return "ok"


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(device="cuda").manual_seed(seed)


def positions(backend: str) -> str:
    """Check that a graph which counts its position draws what eager calls draw at each."""
    z, b = logits(4, VOCAB, "cuda", spread=0.5)
    position = torch.zeros(4, dtype=torch.int64, device="cuda")
    o = options(z, alpha=0.0, temperature=1.0, position=position)
    sample = OPERATORS["sample noisy"].run
    drawn: list[Tensor] = []

    def call() -> None:
        drawn[:] = sample(z, b, o, backend, None)
        position.add_(1)

    graph = capture([call])
    position.zero_()
    torch.cuda.synchronize()
    tokens = []
    for _ in range(8):
        graph.replay()
        tokens.append(drawn[0].tolist())
    for i, row in enumerate(tokens):
        at = Options(**(vars(o) | {"position": i}))
        if (eager := sample(z, b, at, backend, None)[0].tolist()) != row:
            return f"position {i}: the graph drew {row}, an eager call {eager}"
    distinct = len({tuple(row) for row in tokens})
    return "ok" if distinct == 8 else f"{distinct} different draws at 8 positions"


def no_allocation(backend: str) -> str:
    """Check that steer and sample, given their workspace, allocate nothing through PyTorch."""
    kernels = import_module(dispatch.MODULES[backend])
    z, b = logits(4, VOCAB, "cuda", BF16)
    out, o = torch.empty_like(z), options(z)
    mask = Mask((2.0, None), 0.1, -INF)
    draw = checks.draw(0.8, 0, 1.0, 0.0, o.seed, o.position, z)
    token = torch.empty(4, dtype=torch.int64, device="cuda")
    logprob = torch.empty(4, device="cuda")
    space = torch.empty(kernels.workspace_size(4, VOCAB), device="cuda")
    counts = []

    def call() -> None:
        counts.append(torch.cuda.memory_stats()["allocation.all.allocated"])
        kernels.steer(z, b, mask, out, workspace=space)
        kernels.sample(z, b, mask, draw, token, logprob, workspace=space)
        counts.append(torch.cuda.memory_stats()["allocation.all.allocated"])

    capture([call]).replay()
    torch.cuda.synchronize()
    want = OPERATORS["sample noisy"].run(z, b, o, backend, None)
    if not _equal((token, logprob), want):
        return "the captured calls differ from eager ones"
    made = counts[-1] - counts[-2]
    return "ok" if made == 0 else f"{made} allocations while capturing"


def two_streams(backend: str) -> str:
    """Check 200 eager calls and 200 replays on each of two streams at once, on their own rows."""
    steer, sample = OPERATORS["steer"].run, OPERATORS["sample noisy"].run
    sides = []
    for n in (3, 4):
        z, b = logits(n, VOCAB, "cuda", BF16)
        o, out = options(z), torch.empty_like(z)
        want = (*steer(z, b, o, backend, None), *sample(z, b, o, backend, None))
        drawn: list[Tensor] = []

        def call(z=z, b=b, o=o, out=out, drawn=drawn) -> None:
            steer(z, b, o, backend, out)
            drawn[:] = sample(z, b, o, backend, None)

        sides.append((torch.cuda.Stream(), call, capture([call]), tuple(drawn), drawn, out, want))
    torch.cuda.synchronize()
    for way in ("replays", "eager calls"):
        for _ in range(200):
            for stream, call, graph, *_ in sides:
                with torch.cuda.stream(stream):
                    graph.replay() if way == "replays" else call()
        torch.cuda.synchronize()
        for _, _, _, captured, drawn, out, want in sides:
            got = captured if way == "replays" else tuple(drawn)
            if not _equal((out, *got), want):
                return f"{way} on two streams differ from calls one after the other"
    return "ok"


def sanitizer(run: Run) -> dict[str, Any]:
    """Map each tool to its summary line, over every operator on tiny rows."""
    if run.device != "cuda":
        return {"skipped": "needs a CUDA device"}
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"skipped": "compute-sanitizer is not on PATH"}
    # Each tensor gets its own allocation, so an access past its end is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result: dict[str, Any] = {}
    for name in ("memcheck", "racecheck"):
        if run.left() < 10:
            result[name] = "skipped: time"
            continue
        command = [tool, "--tool", name, sys.executable, "-m", "benchmarks.gpu.correctness"]
        limit = min(60.0, run.left())
        result[name] = _summary(command, environment, limit)
        run.keep(result, every=0)
    return result


def _summary(command: list[str], environment: dict[str, str], limit: float) -> dict[str, Any]:
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own group, from start_new_session
        output = process.communicate()[0]
        return {"summary": f"no answer in {limit:.0f} s", "output": output[-1000:]}
    lines = output.splitlines()
    found = [line.strip("= ") for line in lines if "SUMMARY" in line]
    clean = process.returncode == 0 and found and found[-1].endswith(("0 errors", "0 warnings)"))
    said = {"summary": found[-1] if found else f"exit code {process.returncode}"}
    return said if clean else said | {"output": output[:3000]}
