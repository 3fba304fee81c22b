"""The tables of docs/limits.md, made of what the tests find: python -m tests.limits"""

import functools
import re
from pathlib import Path

import peft
import transformers

from tests.data import tokenizer_cases
from tests.model import architecture_cases, peft_cases

PAGE = Path(__file__).parents[1] / "docs" / "limits.md"


def peft_methods():
    """Which PEFT methods are paired, decoded in two passes, or refused, and why."""
    indices = [i for i, case in enumerate(peft_cases.CASES) if peft_cases.available(case)]
    rows = [peft_cases.found(i) for i in indices]
    return "\n".join(
        ["| method | outcome | why |", "| --- | --- | --- |"]
        + [f"| {row.method} | {row.outcome} | {row.reason} |" for row in rows]
    )


@functools.cache
def found_architectures():
    """What becomes of each architecture of which a tiny model can be built."""
    found = (architecture_cases.found(name) for name in architecture_cases.buildable())
    return sorted({row.architecture: row for row in found if row is not None}.values())


def architectures():
    """Which architectures are paired, decoded in two passes, or refused, and why."""
    lines = ["| architecture | outcome | why |", "| --- | --- | --- |"]
    found = found_architectures()
    for outcome in ("paired", "two passes", "refused"):
        reasons = {}
        for row in found:
            if row.outcome == outcome:
                reasons.setdefault(row.reason, []).append(row.architecture)
        for reason, names in reasons.items():
            lines.append(f"| {', '.join(names)} | {outcome} ({len(names)}) | {reason} |")
    return "\n".join(lines)


def steps():
    """How decode steps of the paired architectures run on a CPU."""
    lines = ["| step | architectures |", "| --- | --- |"]
    ways = {}
    for row in found_architectures():
        if row.outcome == "paired":
            ways.setdefault(re.sub(r" by \d\S*$", "", row.step), []).append(row.architecture)
    for way in sorted(ways, key=lambda way: (way.startswith("module"), -len(ways[way]), way)):
        lines.append(f"| {way} ({len(ways[way])}) | {', '.join(ways[way])} |")
    return "\n".join(lines)


def tokenizers():
    """With which tokenizers prompts, answers and chats are exact, or refused, and why."""
    return "\n".join(
        ["| tokenizer | outcome | why |", "| --- | --- | --- |"]
        + [f"| {row.case} | {row.outcome} | {row.reason} |" for row in tokenizer_cases.found()]
    )


TABLES = {
    "peft methods": peft_methods,
    "architectures": architectures,
    "steps": steps,
    "tokenizers": tokenizers,
}


def is_documented_peft():
    """Whether the installed PEFT is the version that the page was made with."""
    return f"peft {peft.__version__}" in PAGE.read_text(encoding="utf-8")


def is_documented_transformers():
    """Whether the installed transformers is the version that the page was made with."""
    return f"transformers {transformers.__version__}" in PAGE.read_text(encoding="utf-8")


def table(name):
    """The lines of a table in the page."""
    return _pattern(name).search(PAGE.read_text(encoding="utf-8"))[2].strip().splitlines()


def _pattern(name):
    return re.compile(f"(<!-- {name} -->\n)(.*?)(<!-- / -->)", re.DOTALL)


def main():
    text = PAGE.read_text(encoding="utf-8")
    for name, made in TABLES.items():
        start, end = _pattern(name).search(text).span(2)
        text = f"{text[:start]}\n{made()}\n\n{text[end:]}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
