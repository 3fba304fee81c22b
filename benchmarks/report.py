"""Put benchmarks/results into the tables of the documents: python -m benchmarks.report [--check]

A table goes between `<!-- figures:operators -->` (or another name) and `<!-- /figures -->`.
"""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import quality_report
from benchmarks.markdown import table

ROOT = Path(__file__).resolve().parents[1]
VOCAB, ROWS, DTYPES = 151936, (1, 32), ("float32", "bfloat16")
CONTENDERS = {
    "steered": "**steered**, one paired batch",
    "adapted": "the same engine, adapted model alone",
    "sequential": 'steered, two passes (`pairing="sequential"`)',
    "generate, merged": "Hugging Face `generate`, merged, un-steered",
    "generate, PEFT": "Hugging Face `generate`, PEFT, un-steered",
    "naive": "naive: PEFT on, PEFT off, eager steering",
}
SUMMARY = {
    "steered": "**steered**: base and adapted model in one batch",
    "adapted": "not steered: the adapted model alone, same engine",
    "generate, merged": "not steered: Hugging Face `generate`, adapter merged",
    "naive": "steered naively: two PEFT passes, the formula in PyTorch",
}


def number(value: float) -> str:
    """Three digits, or all before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def source(result: dict, *packages: str) -> str:
    """Which machine, which versions, which command."""
    versions = [f"{name} {result['versions'][name]}" for name in packages]
    where = ", ".join([result["machine"], *versions, result["system"], result["date"]])
    return f"{where}; `{result['command']}`"


def operators(result: dict) -> str:
    keys = ("dtype", "vocab", "n", "name")
    measured = {tuple(map(case["params"].get, keys)): case for case in result["cases"]}
    rows = []
    for n in ROWS:
        for dtype in DTYPES:
            names = ("steer", "sample", "eager", "compiled", "read", "clone")
            cases = {name: measured[dtype, VOCAB, n, name] for name in names}
            times = {name: case["median"] for name, case in cases.items()}
            rows.append([
                f"N = {n}, {dtype}",
                *(number(times[name] * 1e6) for name in ("steer", "sample")),
                *(f"{number(times[name] / times['steer'])}x" for name in ("eager", "compiled")),
                *(number(times[name] * 1e6) for name in ("read", "clone")),
                number(cases["steer"]["bytes"] / times["steer"] / 1e9),
            ])  # fmt: skip
    head = ["", "`steer`, us", "`sample`, us", "eager / steer", "compiled / steer",
            "read both rows, us", "copy one row, us", "`steer`, GB/s"]  # fmt: skip
    return (
        f"V = {VOCAB}; medians. {source(result, 'svd-engine')}.\n\n{table(head, rows)}\n\n"
        "Eager is the paper's formula in PyTorch; compiled is `torch.compile` of the form in which "
        "the base softmax cancels. GB/s counts two rows read and one written."
    )


def decoding(result: dict) -> dict[tuple[str, int, str], dict]:
    """The contenders of each case of decoding alone, by adapter, batch and dtype."""
    return {
        (case["adapter"], case["batch"], case["dtype"]): case["contenders"]
        for case in result["cases"]
        if "request" not in case["name"]
    }


def summary(result: dict) -> str:
    """The README's rows of `engine`, ms per token."""
    measured = decoding(result)
    rows = [
        [words, *(number(measured["LoRA", 1, d][name]["median"] * 1e3) for d in DTYPES)]
        for name, words in SUMMARY.items()
    ]
    return (
        f"{table(['ms per token', *DTYPES], rows)}\n\nSmolLM2-135M-Instruct with a LoRA on all "
        f"linear layers, batch 1. {source(result)}."
    )


def gain(result: dict) -> str:
    """What steering gains in the paper's direction and without the projection, one objective."""
    rows = [
        [words, quality_report.span(result["objective_gain"][f"ranking a token{variant}"])]
        for words, variant in (
            ("the paper's direction", ""),
            ("without the projection (`projection=False`)", ", without the projection"),
        )
    ]
    methods, splits = (len({case[key] for case in result["cases"]}) for key in ("method", "seed"))
    return (
        f"{table(['steered over adapted', 'points, 95 % interval'], rows)}\n\nTruthfulQA: average "
        f"of MC1, MC2 and MC3 on test questions, mean of {methods} PEFT methods and {splits} "
        f"splits. {result['model']}, {result['date']}; `{result['command']}`."
    )


def engine(result: dict) -> str:
    measured = decoding(result)
    first = result["cases"][0]
    rows = []
    for name, words in CONTENDERS.items():
        times = [measured["LoRA", 1, dtype][name] for dtype in DTYPES]
        cells = [(number(time["median"] * 1e3), f"{time['ratio']:.2f}") for time in times]
        rows.append([words, *cells[0], *cells[1]])
    head = ["", *(cell for dtype in DTYPES for cell in (f"{dtype}, ms/token", "ratio"))]
    batches = [
        f"{number(case['8 prompts']['tokens/s'])} tokens/s in {dtype}, against "
        f"{number(case['steered']['tokens/s'])} for one prompt"
        for dtype in DTYPES
        for case in [measured["LoRA", 8, dtype]]
    ]
    prefix = [
        f"{number(case['steered']['median'] * 1e3)} ms in {dtype}, "
        f"{1 / case['adapted']['ratio']:.2f} times the adapted model alone and "
        f"1/{case['naive']['ratio']:.1f} of the naive loop"
        for dtype in DTYPES
        for case in [measured["prefix", 1, dtype]]
    ]
    return (
        f"SmolLM2-135M-Instruct with a LoRA (r = 8, all linear layers), batch 1, "
        f"{first['prompt_tokens']} prompt tokens, {first['new_tokens']} new ones, prefill not "
        f"counted. {source(result, 'transformers', 'peft', 'svd-engine')}."
        f"\n\n{table(head, rows)}\n\n"
        f"Medians of {first['contenders']['steered']['rounds']} rounds in which the contenders "
        "take turns; a ratio is the median of the time over the steered time of the same round. "
        f"Steered, a batch of 8 prompts of different lengths: {'; '.join(batches)}. With prefix "
        f"tuning of 20 virtual tokens a steered token takes {'; '.join(prefix)}."
    )


def requests(result: dict) -> str:
    """Whole requests by shape, seconds."""
    cases = [case for case in result["cases"] if "request" in case["name"]]
    rows = [
        [f"{case['prompt_tokens']} + {case['new_tokens']}, {case['dtype']}"]
        + [number(case["contenders"][name]["median"]) for name in CONTENDERS]
        for case in cases
    ]
    head = ["prompt + new tokens", *(words.replace("*", "") for words in CONTENDERS.values())]
    memory = [
        f"{case['weight_bytes'] / 1e6:.0f} MB of weights, each once, and "
        f"{case['cache_bytes'] / 1e6:.1f} MB of KV cache for both models in {case['dtype']}"
        for case in result["cases"]
        if "weight_bytes" in case and case["adapter"] == "LoRA"
    ]
    return (
        f"Seconds per request, prefill included. {source(result, 'transformers', 'peft')}.\n\n"
        f"{table(head, rows)}\n\nThe engine holds {'; '.join(memory)} "
        f"({result['cases'][0]['prompt_tokens'] + result['cases'][0]['new_tokens']} positions)."
    )


def start(result: dict) -> str:
    """Seconds of a fresh process by what it does."""
    rows = []
    for case in result["cases"]:
        seconds = case["seconds"]
        until = sum(seconds[part] for part in ("import", "load", "first token"))
        cells = [number(x) for x in (*seconds.values(), until)]
        rows.append([f"{case['base']}, {case['dtype']}", *cells])
    head = [
        "SmolLM2-135M from",
        "import",
        "load",
        "first token",
        "the same again",
        "all to the first",
    ]
    return (
        f"Seconds; medians of {result['cases'][0]['rounds']} processes, files in the page cache. "
        f"{source(result, 'transformers', 'peft')}.\n\n{table(head, rows)}"
    )


def plot(result: dict, path: Path) -> None:
    """GB/s of the operators against V, beside what reading the rows reaches, to an SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "svd-engine"  # the same figures give the same file
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
            style = dict(color="0.6") if name == "read" else {}
            line = "-" if dtype == "float32" else "--"
            panel.plot(
                *zip(*points, strict=True), line, marker=".", label=f"{label}, {dtype}", **style
            )
        panel.set(title=f"N = {n}", xlabel="vocabulary", ylim=(0, None))
    panels[0].set_ylabel("GB/s")
    panels[1].legend(fontsize="x-small")
    figure.savefig(path, metadata={"Date": None})


# (document, figures, where they come from, their table)
TABLES = (
    ("docs/performance.md", "operators", "cpu_operators", operators),
    ("docs/performance.md", "engine", "cpu_engine", engine),
    ("README.md", "summary", "cpu_engine", summary),
    ("README.md", "gain", "quality_truthfulqa", gain),
    ("docs/performance.md", "requests", "cpu_engine", requests),
    ("docs/performance.md", "start", "cpu_start", start),
    *quality_report.TABLES,
)


def put(text: str, document: str, name: str, figures: str) -> str:
    """The text with new figures between the markers. Raises ValueError where there are none."""
    start, end = f"<!-- figures:{name} -->", "<!-- /figures -->"
    pattern = re.compile(f"({re.escape(start)}\n).*?({re.escape(end)})", re.DOTALL)
    text, found = pattern.subn(lambda m: f"{m[1]}\n{figures}\n\n{m[2]}", text)
    if found != 1:
        raise ValueError(f"{document} needs one {start} ... {end}; it has {found}")
    return text


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> str | None:
    """None, or what is wrong in one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where a table is out of date")
    check = parser.parse_args(arguments).check
    results = root / "benchmarks" / "results"
    try:
        documents = {name: (root / name).read_text(encoding="utf-8") for name, *_ in TABLES}
        for document, name, origin, figures in TABLES:
            path = results / f"{origin}.json"
            if origin.startswith("quality_") and not path.exists():  # takes hours: may come later
                text = f"Not measured yet: {quality_report.command(origin)}."
            else:
                text = figures(json.loads(path.read_text(encoding="utf-8")))
            documents[document] = put(documents[document], document, name, text)
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(root)} does not exist."
    except ValueError as error:
        return f"{error}."
    changed = {
        name: text
        for name, text in documents.items()
        if text != (root / name).read_text(encoding="utf-8")
    }
    if changed and check:
        shown = " and ".join(changed)
        return f"{shown} does not show the figures in benchmarks/results; run `make docs`."
    for name, text in changed.items():
        (root / name).write_text(text, encoding="utf-8")
    if changed:
        operators = json.loads((results / "cpu_operators.json").read_text(encoding="utf-8"))
        plot(operators, results / "cpu_operators.svg")
    return None


if __name__ == "__main__":
    sys.exit(main())
