"""The table and the plot of the operators on the CPU."""

import itertools
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.tables import number, table

VOCAB, ROWS, DTYPES = 151936, (1, 32), ("float32", "bfloat16")
NAMES = ("steer", "sample", "eager", "compiled", "read", "clone")
HEAD = (
    "",
    "`steer`, us",
    "`sample`, us",
    "eager / steer",
    "compiled / steer",
    "read both rows, us",
    "copy one row, us",
    "`steer`, GB/s",
)


def operators(result: dict[str, Any]) -> str:
    """Format the medians at `VOCAB`, and what they mean."""
    keys = ("dtype", "vocab", "n", "name")
    measured = {tuple(map(case["params"].get, keys)): case for case in result["cases"]}
    rows = []
    for n, dtype in itertools.product(ROWS, DTYPES):
        cases = {name: measured[dtype, VOCAB, n, name] for name in NAMES}
        times = {name: case["median"] for name, case in cases.items()}
        micros = {name: number(time * 1e6) for name, time in times.items()}
        ratios = [f"{number(times[name] / times['steer'])}x" for name in ("eager", "compiled")]
        speed = number(cases["steer"]["bytes"] / times["steer"] / 1e9)
        ours, rivals = ([micros[x] for x in pair] for pair in (NAMES[:2], NAMES[-2:]))
        rows.append([f"N = {n}, {dtype}", *ours, *ratios, *rivals, speed])
    versions = records.named(result["versions"], "svd-engine")
    source = records.source(result, result["machine"], *versions, result["system"])
    return (
        f"V = {VOCAB}; medians. {source}.\n\n{table(HEAD, rows)}\n\n"
        "Eager is the paper's formula in PyTorch; compiled is `torch.compile` of the form in which "
        "the base softmax cancels. GB/s counts two rows read and one written."
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot GB/s of the operators against V, beside reading the rows, to an SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "svd-engine"  # equal figures give equal files
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharex=True, layout="constrained")
    for panel, n in zip(panels, ROWS, strict=True):
        for name, dtype in itertools.product(("steer", "sample", "read"), DTYPES):
            points = sorted(
                (case["params"]["vocab"], case["bytes"] / case["median"] / 1e9)
                for case in result["cases"]
                if case["params"].get("n") == n
                and (case["params"]["name"], case["params"]["dtype"]) == (name, dtype)
            )
            label = "limit: torch reads both rows" if name == "read" else name
            style = {"color": "0.6"} if name == "read" else {}
            line = "-" if dtype == "float32" else "--"
            panel.plot(
                *zip(*points, strict=True), line, marker=".", label=f"{label}, {dtype}", **style
            )
        panel.set(title=f"N = {n}", xlabel="vocabulary", ylim=(0, None))
    panels[0].set_ylabel("GB/s")
    panels[1].legend(fontsize="x-small")
    figure.savefig(path, metadata={"Date": None})


# (document, figures, where they come from, their table)
TABLES = (("docs/performance.md", "operators", "cpu_operators", operators),)
