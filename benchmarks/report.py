"""Put benchmarks/results into the tables of the documents: python -m benchmarks.report [--check]

A table goes between `<!-- figures:operators -->` (or another name) and `<!-- /figures -->`.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.engine import fewer_steps
from benchmarks.engine import tables as engine
from benchmarks.gpu import published as gpu
from benchmarks.kernels import tables as kernels
from benchmarks.quality import tables as quality
from benchmarks.records import ROOT
from benchmarks.serving import tables as serving
from benchmarks.vllm import tables as vllm

Form = Callable[[dict[str, Any]], str]
# (document, figures, where they come from, their table)
TABLES: tuple[tuple[str, str, str, Form], ...] = (
    *kernels.TABLES,
    *engine.TABLES,
    *fewer_steps.TABLES,
    *quality.TABLES,
    *gpu.TABLES,
    *serving.TABLES,
    *vllm.TABLES,
)

LATER = {  # figures of one machine
    "cpu_step": "`make bench`",
    "cpu_weights": "`make bench`",
    "cpu_serving": "`make bench`",
    "cpu_speculation": "`make bench`",
    "cpu_prefix": "`make bench`",
    "cpu_levers": "`make bench`",
    "cpu_vllm": "`python -m benchmarks.vllm`",
    "gpu": "`python -m benchmarks.gpu`",
}


def put(text: str, document: str, name: str, figures: str) -> str:
    """Replace the figures between the markers. Raises ValueError if there are none."""
    start, end = f"<!-- figures:{name} -->", "<!-- /figures -->"
    pattern = re.compile(f"({re.escape(start)}\n).*?({re.escape(end)})", re.DOTALL)
    text, found = pattern.subn(lambda m: f"{m[1]}\n{figures}\n\n{m[2]}", text)
    if found != 1:
        raise ValueError(f"{document} needs one {start} ... {end}; it has {found}")
    return text


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> str | None:
    """Return None, or what is wrong in one line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a table is out of date")
    check = parser.parse_args(arguments).check
    results = root / "benchmarks" / "results"
    try:
        before = {name: (root / name).read_text(encoding="utf-8") for name, *_ in TABLES}
        after = dict(before)
        for document, name, origin, form in TABLES:
            path = results / f"{origin}.json"
            if origin == "gpu" and not path.exists():
                figures = "Not measured yet: `python -m benchmarks.gpu`."
            elif origin.startswith("quality_") and not path.exists():  # takes hours: may come later
                figures = f"Not measured yet: {quality.command(origin)}."
            elif origin in LATER and not path.exists():
                figures = f"Not measured yet: {LATER[origin]}."
            else:
                figures = form(records.read(path))
            after[document] = put(after[document], document, name, figures)
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(root)} does not exist."
    except ValueError as error:
        return f"{error}."
    changed = [name for name in after if after[name] != before[name]]
    if changed and check:
        shown = " and ".join(changed)
        return f"{shown} does not show the figures in benchmarks/results; run `make docs`."
    for name in changed:
        (root / name).write_text(after[name], encoding="utf-8")
    if changed:
        kernels.plot(records.read(results / "cpu_operators.json"), results / "cpu_operators.svg")
    return None


if __name__ == "__main__":
    sys.exit(main())
