"""The figures of docs/method.md, drawn from the JSON as SVG."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import records
from benchmarks.quality.tables import METHODS


def draw(results: Path) -> list[Path]:
    """Draw every figure whose results exist, and return the files."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "svd-engine"  # equal figures give equal files
    drawn = []
    for plot, origin in ((curves, "truthfulqa"), (gains, "truthfulqa"), (by_steps, "steps")):
        path = results / f"quality_{origin}.json"
        if path.is_file():
            figure = plot(records.read(path)["cases"])
            drawn.append(results / f"quality_{plot.__name__}.svg")
            figure.savefig(drawn[-1], metadata={"Date": None})
    return drawn


def curves(cases: list[dict[str, Any]]) -> Any:
    """Plot the average of MC1, MC2 and MC3 against mu, the chosen strength marked."""
    figure, axes = _axes()
    for i, case in enumerate(case for case in cases if "curve" in case):
        axes.plot(*zip(*case["curve"], strict=True), color=f"C{i}", label=METHODS[case["method"]])
        point = case["calibration"]["strength"], case["models"]["steered"]["average"]["mean"]
        axes.plot(*point, "o", color=f"C{i}")
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.axhline(
        cases[0]["models"]["base"]["average"]["mean"], color="0.6", linestyle=":", label="base"
    )
    axes.set_xscale("symlog", linthresh=1)
    axes.set(xlabel="mu (a point: as calibrated)", ylabel="average of MC1, MC2, MC3, per cent")
    axes.legend(fontsize="small")
    return figure


def gains(cases: list[dict[str, Any]]) -> Any:
    """Plot the gain of steering by method, a point per fold and seed, with 95 % intervals."""
    figure, axes = _axes()
    methods = list(dict.fromkeys(case["method"] for case in cases))
    parts = list(dict.fromkeys((case["seed"], case["fold"]) for case in cases))
    for i, (seed, fold) in enumerate(parts):
        found = [c["gain"]["average"] for c in cases if (c["seed"], c["fold"]) == (seed, fold)]
        means, lows, highs = (np.array([x[key] for x in found]) for key in ("mean", "low", "high"))
        places = np.arange(len(found)) + 0.08 * (i - (len(parts) - 1) / 2)
        axes.errorbar(
            places, means, [means - lows, highs - means], fmt="os"[seed % 2], capsize=2,
            color=f"C{fold}", label=f"fold {fold}" if seed == parts[0][0] else None,
        )  # fmt: skip
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_xticks(range(len(methods)), [METHODS[method] for method in methods])
    axes.legend(fontsize="small")
    axes.set_ylabel("gain over un-steered, points")
    return figure


def by_steps(cases: list[dict[str, Any]]) -> Any:
    """Plot adapted and steered against the steps of the warm start."""
    figure, axes = _axes()
    steps = [case["steps"] for case in cases]
    for name in ("adapted", "steered"):
        figures = [case["models"][name]["average"] for case in cases]
        axes.plot(steps, [x["mean"] for x in figures], marker="o", label=name)
        axes.fill_between(
            steps, [x["low"] for x in figures], [x["high"] for x in figures], alpha=0.15
        )
    axes.set(xlabel="steps of 16 answers", ylabel="average of MC1, MC2, MC3, per cent")
    axes.legend()
    return figure


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes
