"""Clocks for a GPU and for a CPU, and the machine they run on."""

import math
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch

from benchmarks.gpu.worker import Run
from benchmarks.records import versions
from svd_engine import ops

Call = Callable[[], object]


def synchronize(device: str) -> None:
    """Wait for a GPU. Raises if the device is lost, which ends the section."""
    if device == "cuda":
        torch.cuda.synchronize()


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """Capture all calls in order as one CUDA graph, after two warm-up calls on a side stream.

    The graph frees what the calls return; give them outputs to keep results.
    """
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for _ in range(2):
            calls[0]()
    torch.cuda.current_stream().wait_stream(warm)
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    finally:
        torch.cuda.set_stream(stream)  # a failed capture leaves its own stream as the current one
    return graph


def replays(graph: torch.cuda.CUDAGraph, rounds: int) -> list[float]:
    """Return the seconds of each replay, by CUDA events; the host runs ahead of the device."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * rounds)]
    graph.replay()
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000)  # about a millisecond, in which the replays queue up
    for start, end in zip(marks[::2], marks[1::2], strict=True):
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [s.elapsed_time(e) / 1e3 for s, e in zip(marks[::2], marks[1::2], strict=True)]


def per_call(device: str, calls: Sequence[Call], limit: float = 0.2) -> float:
    """Return the median seconds per call, in replays of one CUDA graph or by a CPU's clock."""
    if device == "cuda":
        graph = capture(calls)
        once = replays(graph, 2)
        rounds = max(3, min(25, int(limit / max(min(once), 1e-9))))
        return median(replays(graph, rounds)) / len(calls)
    calls[0]()
    seconds = []
    for call in calls[:5]:
        start = perf_counter()
        call()
        seconds.append(perf_counter() - start)
    return median(seconds)


def host_cost(device: str, call: Call, count: int = 200, rounds: int = 7) -> float:
    """Return the host's seconds per call; within a round nothing waits for the device."""
    seconds = []
    for _ in range(rounds):
        synchronize(device)
        start = perf_counter()
        for _ in range(count):
            call()
        seconds.append((perf_counter() - start) / count)
    return median(seconds)


def l2_bytes(device: str) -> int:
    if device != "cuda":
        return 1 << 20
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)) or 50 << 20


def sets(device: str, size: int, quick: bool) -> int:
    """Return how many buffer sets of `size` bytes it takes to find the L2 cold on each."""
    if quick:
        return 2
    cache = l2_bytes(device)
    if size >= 8 * cache:
        return 1
    return max(2, min(512, math.ceil(4 * cache / size)))


def machine(run: Run) -> dict[str, Any]:
    """Describe the software and the device."""
    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.machine()}
    found |= versions("torch", "triton", "transformers", "peft", "flashinfer-python")
    found["backends"] = {name: reason or "ok" for name, reason in ops.backends().items()}
    if run.device != "cuda":
        return found | {"device": "cpu", "threads": torch.get_num_threads()}
    device = torch.cuda.get_device_properties(0)
    found |= {
        "device": device.name,
        "compute capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory, GiB": device.total_memory / 2**30,
        "L2, bytes": l2_bytes("cuda"),
        "CUDA of torch": torch.version.cuda,
    }
    for name in ("clock_rate", "memory_clock_rate"):  # kHz; newer torch only
        if isinstance(rate := getattr(device, name, None), int):
            found[f"{name}, MHz"] = rate / 1e3
    return found | _nvidia_smi()


def _nvidia_smi() -> dict[str, str]:
    asked = "driver_version,clocks.max.sm,clocks.max.mem,clocks.sm,power.limit,temperature.gpu"
    if shutil.which("nvidia-smi") is None:
        return {"nvidia-smi": "not on PATH"}
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return {"nvidia-smi": "no answer in 10 s"}
    values = [value.strip() for value in answer.stdout.strip().split(",")]
    if answer.returncode or len(values) != len(asked.split(",")):
        return {"nvidia-smi": (answer.stdout + answer.stderr).strip()[:200]}
    return dict(zip(asked.split(","), values, strict=True))


def bandwidth(run: Run) -> dict[str, Any]:
    """Time device copies, and sums, which only read; bytes read and bytes written count.

    "GB/s" and "read GB/s" are the best sizes' medians.
    """
    cases: list[dict[str, Any]] = []
    for mebibytes in (1, 4) if run.quick else (256, 1024, 4096):
        size = mebibytes << 20
        if run.device == "cuda" and torch.cuda.mem_get_info()[0] < 5 * size:
            cases.append({"MiB": mebibytes, "skipped": "memory"})
            continue
        # Random: a copy of zeros can be faster than one of data.
        source = torch.randint(256, (size,), dtype=torch.uint8, device=run.device)
        target = torch.empty_like(source)
        seconds = per_call(run.device, [partial(target.copy_, source)] * 3)
        copied = {"us": seconds * 1e6, "GB/s": 2 * size / seconds / 1e9}
        seconds = per_call(run.device, [source.view(torch.float32).sum] * 3)
        read = {"read us": seconds * 1e6, "read GB/s": size / seconds / 1e9}
        cases.append({"MiB": mebibytes} | copied | read)
        del source, target
    best = {key: max(case.get(key, 0.0) for case in cases) for key in ("GB/s", "read GB/s")}
    return best | {"cases": cases}
