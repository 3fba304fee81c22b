"""Predict the times of the Triton kernels without a GPU: python -m benchmarks.gpu.predict

The counts are the budgets of tests/ops, the bandwidths those of benchmarks/results/gpu.json. Rows
are like a model's: three tokens carry them.
"""

import argparse
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from benchmarks import records
from benchmarks.gpu import roofline, tables
from benchmarks.gpu.roofline import Device, Launch, microseconds
from benchmarks.tables import number, table
from tests.ops.budgets import BUDGETS

VOCAB, ROWS = 151936, (1, 32, 1024)
DTYPES = {"bfloat16": ("bf16", 2), "float32": ("fp32", 4)}
# The second pass where it is one program per row: kernel, flags, and reads of the target, of which
# each waits for the one before.
BY_ROW = {
    "sample greedy": ("sample_rows", " GREEDY", 0),
    "score": ("score_rows", " REMOVE", 2),
    "topk": ("topk_rows", " REMOVE", 0),
    "project_strength": ("project_rows", "", 2),
}
OPERATORS = ("steer", *BY_ROW, "divergence")
LIVE = 3  # tiles of a row with support; their marked cells are one block
# `topk`: results, and instructions and barriers of each in a loop that reads no logits.
RESULTS, RESULT = 8, (170, 3)
FITTED = {("steer", "bfloat16", 1), ("steer", "bfloat16", 1024)}

Case = tuple[str, str, int]  # operator, dtype, N


def launches(case: Case, on: Device) -> Iterator[Launch]:
    """Yield the launches of a call on `[N, VOCAB]`, as `svd_engine.kernels.launch` has them."""
    from svd_engine.kernels.launch import MANY_ROWS, ROW_WARPS, STREAM_WARPS, TILE

    name, dtype, n = case
    short, size = DTYPES[dtype]
    tiles = -(-VOCAB // TILE)
    pairs = 2 * VOCAB * size / tiles  # bytes of a tile
    far = n * tiles * pairs > on.l2_bytes  # the second pass finds logits in memory, not in the L2
    flag = {"steer": "", "divergence": " BASE"}.get(name, " MARKED")
    first = BUDGETS[f"measure_tiles {short}{flag}"]
    yield Launch(
        n * tiles, STREAM_WARPS, parallel=first.reading, barriers=first.reading_barriers,
        from_memory=1, bytes_read=pairs,
    )  # fmt: skip
    if name == "divergence":
        yield Launch(n, 1, BUDGETS["divergence_rows"].entry, from_l2=1)
    elif name == "steer":
        tile, combine = BUDGETS[f"steer_tiles {short} REMOVE"], BUDGETS["combine_rows"].entry
        if n >= MANY_ROWS:
            yield Launch(n, 1, combine, from_l2=1)
            combine = 0
        yield Launch(
            n * tiles, STREAM_WARPS, tile.entry + combine, tile.reading - tile.entry, LIVE / tiles,
            from_l2=2 - far, from_memory=far, bytes_read=far * pairs * LIVE / tiles,
            bytes_written=pairs / 2,
        )  # fmt: skip
    else:
        kernel, flag, target = BY_ROW[name]
        row, results = BUDGETS[f"{kernel} {short}{flag}"], RESULTS * (name == "topk")
        instructions, barriers = row.loops[0]
        yield Launch(
            n, ROW_WARPS, row.entry + results * RESULT[0], instructions,
            barriers=row.entry_barriers + barriers + results * RESULT[1],
            from_l2=4 - far + target,  # sums of tiles, marks, list of cells, logits
            from_memory=far, registers=row.registers,
        )  # fmt: skip


def predicted(case: Case, on: Device) -> float:
    """Return the microseconds of a call."""
    return sum(microseconds(launch, on) for launch in launches(case, on))


def share(case: Case, time: float, on: Device) -> float:
    """Return the share of copy bandwidth, counted as in `speed`; reading alone can exceed it."""
    name, dtype, n = case
    return n * VOCAB * DTYPES[dtype][1] * (3 if name == "steer" else 2) / (time * 1e3 * on.copy)


def measured(result: dict[str, Any]) -> dict[Case, float]:
    """Return the microseconds in gpu.json. `divergence` takes as long for random rows."""
    return {
        (case["name"], case["dtype"], case["n"]): case["cold_us"]
        for case in result["sections"]["operators"]["result"]["cases"]
        if case["name"] in OPERATORS and "cold_us" in case
        if (case["backend"], case["vocab"]) == ("triton", VOCAB)
        if case.get("rows") == "peaked" or case["name"] == "divergence"
    }


def errors(result: dict[str, Any], on: Device) -> dict[Case, float]:
    """Return how far predictions are from what was measured, but for what they were fitted to."""
    known = measured(result)
    return {case: predicted(case, on) / known[case] - 1 for case in known.keys() - FITTED}


def report(result: dict[str, Any], name: str = "H200") -> str:
    """Format the predictions, beside what was measured if it was on this device."""
    on = roofline.device(result, name)
    known = measured(result) if name in result["device"] else {}
    rows = []
    for operator in OPERATORS:
        for dtype in DTYPES:
            cells = [f"`{operator.split()[0]}`, {dtype}"]
            for case in ((operator, dtype, n) for n in ROWS):
                time = predicted(case, on)
                cells.append(f"{number(time)}, {tables.percent(share(case, time, on))}")
                cells += [number(known.get(case))] if known else []
            rows.append(cells)
    columns = ("N = {}, predicted", "measured") if known else ("N = {}",)
    head = ["", *(column.format(n) for n in ROWS for column in columns)]
    said = (
        f"Predicted for an {name}, Triton: microseconds with a cold L2, and the share of copy "
        f"bandwidth ({number(on.copy)} GB/s), V = {VOCAB}, rows like a model's, `topk` of "
        f"{RESULTS}; `python -m benchmarks.gpu.predict`."
    )
    return "\n\n".join([said, table(head, rows), *([_missed(result, on)] if known else [])])


def _missed(result: dict[str, Any], on: Device) -> str:
    off = {case: abs(error) for case, error in errors(result, on).items()}
    worst = max(off, key=lambda case: off[case])
    return (
        f"Of {len(off)} measured figures to which nothing was fitted, half are predicted within "
        f"{100 * median(off.values()):.0f} %, and all within {100 * off[worst]:.0f} % "
        f"(`{worst[0].split()[0]}`, {worst[1]}, N = {worst[2]})."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.predict", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--gpu", choices=roofline.SHEETS, default="H200")
    name = parser.parse_args(arguments).gpu
    print(report(records.read(records.RESULTS / "gpu.json"), name))


if __name__ == "__main__":
    main()
