"""The tables of the documents on a GPU: correctness and the operators."""

from typing import Any

from benchmarks.gpu import tables
from benchmarks.tables import number, table

OPERATORS = ("steer", "sample greedy", "score")
ROWS = (1, 4, 32, 132, 1024)
KINDS = {"peaked": "like a model's", "random": "random"}


def _result(result: dict[str, Any], section: str) -> dict[str, Any]:
    found: dict[str, Any] = result["sections"].get(section, {}).get("result") or {}
    return found


def correctness(result: dict[str, Any]) -> str:
    """Say how many comparisons with float64 each backend passed, in one line."""
    said = []
    for name in ("triton", "cuda"):
        part = _result(result, f"correctness_{name}")
        right = part["compared"] - len(part["failures"])
        said.append(f"`{name}` is right in {right} of {part['compared']}")
    return f"Compared with float64, {' and '.join(said)}."


def operators(result: dict[str, Any]) -> str:
    """Format microseconds and the share of copy bandwidth at V = 151936 in bfloat16."""
    measured = _result(result, "operators")
    at = {
        (c.get("rows", "random"), c["name"], c["backend"], c["n"]): c
        for c in measured["cases"]
        if c["vocab"] == 151936 and c["dtype"] == "bfloat16" and "error" not in c
    }
    rows = []
    for kind, words in KINDS.items():
        for name in OPERATORS:
            for backend in ("triton", "cuda"):
                cells = [_point(at.get((kind, name, backend, n))) for n in ROWS]
                if set(cells) == {"-"}:
                    continue
                rows.append([f"`{name.split()[0]}`, `{backend}`, {words}", *cells])
    for name in ("two softmaxes", "eager formula", "torch.compile, cancelled form"):
        rows.append([name, *(_point(at.get(("random", name, "torch", n))) for n in ROWS)])
    return table(["", *(f"N = {n}" for n in ROWS)], rows)


def _point(case: dict[str, Any] | None) -> str:
    if case is None:
        return "-"
    return f"{number(case['cold_us'])}, {tables.percent(case.get('of copy'))}"


def gpu(result: dict[str, Any]) -> str:
    """Format what the GPU run has shown."""
    copy = number(_result(result, "bandwidth").get("GB/s"))
    return "\n\n".join(
        [
            tables.source(result) + " " + correctness(result),
            f"Microseconds with a cold L2, and the share of copy bandwidth ({copy} GB/s), "
            "V = 151936, bfloat16:",
            operators(result),
            *([f"{note}."] if (note := _result(result, "operators").get("note")) else []),
        ]
    )


TABLES = (("docs/performance.md", "gpu", "gpu", gpu),)
