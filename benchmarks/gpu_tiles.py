"""The split that `kernels/launch.py` writes down, beside others: which tile, how many warps."""

from itertools import product
from typing import Any

import torch
from gpu import Run, words
from gpu_speed import Rows

from svd_engine.kernels import launch
from tests.ops.cases import BF16

TILES, WARPS = (1024, 2048, 4096), (4, 8)
VOCABS, ROWS, NAMES = (151936, 49152), (1, 132), ("steer", "sample greedy")


def section(run: Run) -> dict[str, Any]:
    """Microseconds of bfloat16 rows, L2 cold and hot; on a CPU, where no tile matters, for show."""
    cases: list[dict[str, Any]] = []
    chosen = {"tile": launch.TILE, "warps": launch.STREAM_WARPS}
    result: dict[str, Any] = {"chosen": chosen, "cases": cases}
    try:
        for vocab, n in product((500,) if run.quick else VOCABS, (1,) if run.quick else ROWS):
            rows = Rows(run, n, vocab, BF16)
            for name, tile, warps in product(NAMES, TILES, WARPS):
                case = {"name": name, **rows.about, "tile": tile, "warps": warps}
                if run.left() < 3:
                    cases.append(case | {"skipped": "time"})
                    continue
                launch.TILE, launch.STREAM_WARPS = tile, warps
                try:
                    case |= rows.times(name, rows.calls(name, run.backends[0]))
                except Exception as error:
                    case["error"] = words(error)
                    if run.device == "cuda":
                        torch.cuda.synchronize()
                cases.append(case)
                run.keep(result)
            del rows
    finally:
        launch.TILE, launch.STREAM_WARPS = chosen["tile"], chosen["warps"]
    return result
