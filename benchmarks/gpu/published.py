"""The tables of the documents on a GPU: correctness and the operators."""

from typing import Any

from benchmarks.gpu import tables
from benchmarks.tables import number, table

OPERATORS = (
    "steer", "sample greedy", "sample cut", "score", "topk", "project_strength", "support",
    "divergence", "steer, difference", "sample greedy, difference",
)  # fmt: skip
ROWS = (1, 4, 32, 132, 1024)
KINDS = {"peaked": "like a model's", "random": "random"}
CONTENDERS = {
    "steered": "**steered**, one paired batch",
    "adapted": "the adapted model alone, same engine",
    "walk": "steered, module by module",
}


def _result(result: dict[str, Any], section: str) -> dict[str, Any]:
    found: dict[str, Any] = result["sections"].get(section, {}).get("result") or {}
    return found


def correctness(result: dict[str, Any]) -> str:
    """Say how many comparisons with float64 each backend passed, in one line."""
    said = []
    for name in ("triton", "cuda"):
        part = _result(result, f"correctness_{name}")
        right = part["compared"] - len(part["failures"])
        note = f" ({part['note']})" if "note" in part else ""
        said.append(f"`{name}` is right in {right} of {part['compared']}{note}")
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
            cells = [
                _point(*(at.get((kind, name, backend, n)) for backend in ("triton", "cuda")))
                for n in ROWS
            ]
            if set(cells) != {"-"}:
                rows.append([f"{_named(name)}, {words}", *cells])
    for name in ("two softmaxes", "eager formula", "torch.compile, cancelled form"):
        cells = [_point(at.get(("random", name, "torch", n))) for n in ROWS]
        rows += [[name, *cells]] if set(cells) != {"-"} else []
    return table(["", *(f"N = {n}" for n in ROWS)], rows)


def _named(name: str) -> str:
    operator, _, form = name.partition(" ")
    return f"`{operator.strip(',')}`" + (f", {form}" if form else "")


def _point(case: dict[str, Any] | None, other: dict[str, Any] | None = None) -> str:
    if case is None:
        return "-"
    beside = f" ({number(other['cold_us'])})" if other else ""
    return f"{number(case['cold_us'])}, {tables.percent(case.get('of copy'))}{beside}"


def steps(result: dict[str, Any]) -> str:
    """Format milliseconds per token by model, batch and context, the sampler included."""
    measured = _result(result, "step")
    weights = {m["model"]: m["MB"] for m in measured["models"] if "MB" in m}
    read = _result(result, "bandwidth")["read GB/s"]
    rows = []
    for case in sorted(measured["cases"], key=lambda c: (c["model"], c["batch"], c["context"])):
        times = (case.get(name) for name in CONTENDERS)
        cells = [number(x) if isinstance(x, float) else "-" for x in times]
        limit = number(weights[case["model"]] / read)
        rows.append([f"{case['model']}, {case['batch']} x {case['context']}", *cells, limit])
    head = ["model, batch x context", *CONTENDERS.values(), "reading the weights"]
    return table(head, rows)


def gpu(result: dict[str, Any]) -> str:
    """Format what the GPU run has shown."""
    copy = number(_result(result, "bandwidth").get("GB/s"))
    everything = result | {"command": "python -m benchmarks.gpu"}
    return "\n\n".join(
        [
            tables.source(everything) + " " + correctness(result),
            f"Microseconds of Triton with a cold L2, the share of copy bandwidth ({copy} GB/s), "
            "and microseconds of CUDA C++; V = 151936, bfloat16, `topk` of 8:",
            operators(result),
            *([f"{note}."] if (note := _result(result, "operators").get("note")) else []),
            "Milliseconds per token, bfloat16, random weights, LoRA (r = 8) on all linear layers"
            + (f", {date}:" if (date := result["sections"]["step"].get("date")) else ":"),
            steps(result),
        ]
    )


TABLES = (("docs/performance.md", "gpu", "gpu", gpu),)
