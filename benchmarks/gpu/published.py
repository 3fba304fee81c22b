"""The tables of the documents on a GPU: correctness, the operators, the engine."""

from typing import Any

from benchmarks.gpu import tables
from benchmarks.tables import number, table

OPERATORS = ("steer", "sample greedy", "score")
ROWS = (1, 4, 32, 132, 1024)
KINDS = {"peaked": "like a model's", "random": "random"}
CONTENDERS = {
    "steered": "**steered**, one paired batch",
    "adapted": "the same engine, adapted model alone",
    "steered, no graphs": "steered, without CUDA graphs",
    "sequential": 'steered, two passes (`pairing="sequential"`)',
    "generate, static": "Hugging Face `generate`, merged, static cache, compiled, un-steered",
    "generate, merged": "Hugging Face `generate`, merged, un-steered",
    "naive": "naive: PEFT on, PEFT off, eager steering",
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
        said.append(f"`{name}` is right in {right} of {part['compared']} comparisons with float64")
    return "; ".join(said) + "."


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
                rows.append([f"`{name.split()[0]}`, `{backend}`, {words}", *cells])
    for name in ("two softmaxes", "eager formula", "torch.compile, cancelled form"):
        rows.append([name, *(_point(at.get(("random", name, "torch", n))) for n in ROWS)])
    return table(["", *(f"N = {n}" for n in ROWS)], rows)


def _point(case: dict[str, Any] | None) -> str:
    if case is None:
        return "-"
    return f"{number(case['cold_us'])}, {tables.percent(case.get('of copy'))}"


def engine(result: dict[str, Any]) -> str:
    """Format milliseconds per token by model, batch and context."""
    cases = [c for c in _result(result, "engine")["cases"] if "ms" in c]
    shapes = list(dict.fromkeys((c["model"], c["batch"], c["context"]) for c in cases))
    at = {(c["contender"], c["model"], c["batch"], c["context"]): c["ms"] for c in cases}
    rows = []
    for model, batch, context in shapes:
        cells = (at.get((name, model, batch, context)) for name in CONTENDERS)
        rows.append(
            [f"{model}, {batch} x {context}", *("-" if x is None else number(x) for x in cells)]
        )
    return table(["model, batch x prompt", *CONTENDERS.values()], rows)


def gpu(result: dict[str, Any]) -> str:
    """Format what the GPU run has shown."""
    copy = number(_result(result, "bandwidth").get("GB/s"))
    return "\n\n".join(
        [
            tables.source(result) + " " + correctness(result),
            f"Microseconds with a cold L2, and the share of copy bandwidth ({copy} GB/s), "
            "V = 151936, bfloat16:",
            operators(result),
            "Milliseconds per token, bfloat16, LoRA (r = 8) on all linear layers:",
            engine(result),
        ]
    )


TABLES = (("docs/performance.md", "gpu", "gpu", gpu),)
