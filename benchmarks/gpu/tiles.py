"""The split that `kernels/launch.py` fixes (tile and warps), beside other splits."""

from itertools import product
from typing import Any

from benchmarks.gpu.measure import synchronize
from benchmarks.gpu.speed import Rows
from benchmarks.gpu.worker import Run, words
from svd_engine.kernels import launch
from tests.ops.cases import BF16

TILES, WARPS = (1024, 2048, 4096), (4, 8)
VOCABS, ROWS, NAMES = (151936, 49152), (1, 132), ("steer", "sample greedy")


def section(run: Run) -> dict[str, Any]:
    """Time bfloat16 rows, L2 cold and hot; on a CPU, where no tile matters, to try the plumbing."""
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
                    synchronize(run.device)
                cases.append(case)
                run.keep(result)
            del rows
    finally:
        launch.TILE, launch.STREAM_WARPS = chosen["tile"], chosen["warps"]
    return result
