"""Report of an evaluation: the models side by side, and their paired differences."""

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svd_engine.utils import bootstrap
from svd_engine.utils.files import write_text

Figures = dict[str, dict[str, float]]  # column -> mean, low, high


def summary(
    task: str,
    columns: Sequence[str],
    values: Mapping[str, NDArray[np.float64]],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the JSON report: per cent and 95 % bootstrap intervals of models and differences.

    values: model -> `[questions, columns]` in [0, 1]. A resample draws questions, so differences
    are paired: both models answer the same ones.
    """
    differences = {
        f"{later} - {earlier}": values[later] - values[earlier]
        for earlier, later in list(combinations(values, 2))[::-1]
    }
    return {
        "task": task,
        "questions": len(next(iter(values.values()))),
        "unit": "per cent; mean and 95 % bootstrap interval over questions",
        "columns": list(columns),
        "models": {name: _figures(columns, v) for name, v in values.items()},
        "differences": {name: _figures(columns, v) for name, v in differences.items()},
        "settings": dict(settings),
    }


def _figures(columns: Sequence[str], values: NDArray[np.float64]) -> Figures:
    spans = bootstrap.of_means(100 * values)
    return {
        column: {"mean": float(mean), "low": float(low), "high": float(high)}
        for column, mean, (low, high) in zip(columns, 100 * values.mean(0), spans, strict=True)
    }


def rows(result: Mapping[str, Any], cell: str = "{mean} [{low}, {high}]") -> list[list[str]]:
    """Format the table, header first: the models, then the differences with their sign."""
    table = [["", *result["columns"]]]
    for part, form in (("models", ".1f"), ("differences", "+.1f")):
        for name, figures in result[part].items():
            texts = [
                {key: format(value, form) for key, value in figures[column].items()}
                for column in result["columns"]
            ]
            table.append([name, *(cell.format(**text) for text in texts)])
    return table


def note(result: Mapping[str, Any]) -> str:
    """Explain the table and state the known overlap with the adapter's data."""
    overlap = result["settings"].get("overlap")
    seen = (
        "Of these questions the adapter saw "
        + ", ".join(f"{count} in {kind}" for kind, count in overlap.items())
        if overlap
        else "It is not recorded which questions the adapter has seen"
    )
    steering = result["settings"].get("steering")
    same = (
        " The strength is 0: steered is adapted." if steering and not steering["strength"] else ""
    )
    return (
        "Per cent, with 95 % bootstrap intervals over questions; differences are paired. "
        f"{seen}.{same}"
    )


def markdown(result: Mapping[str, Any]) -> str:
    """Format the report as Markdown: a heading, the table, the note and the settings."""
    header, *body = rows(result)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *body]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"# {result['task']}, {result['questions']} questions\n\n{table}\n\n{note(result)}\n\n"
        f"```json\n{json.dumps(result['settings'], indent=2)}\n```\n"
    )


def save(result: Mapping[str, Any], folder: Path, name: str) -> tuple[Path, Path]:
    """Write `name.json` and `name.md` and return their paths."""
    paths = folder / f"{name}.json", folder / f"{name}.md"
    write_text(paths[0], json.dumps(result, indent=2) + "\n")
    write_text(paths[1], markdown(result))
    return paths
