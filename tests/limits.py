"""The tables of docs/limits.md, made of what the tests find: python -m tests.limits"""

import re
from pathlib import Path

import peft

from tests.model import peft_cases

PAGE = Path(__file__).parents[1] / "docs" / "limits.md"


def peft_methods():
    """Which PEFT methods are paired, decoded in two passes, or refused, and why."""
    indices = [i for i, case in enumerate(peft_cases.CASES) if peft_cases.available(case)]
    rows = [peft_cases.found(i) for i in indices]
    return "\n".join(
        ["| method | outcome | why |", "| --- | --- | --- |"]
        + [f"| {row.method} | {row.outcome} | {row.reason} |" for row in rows]
    )


TABLES = {"peft methods": peft_methods}


def is_documented_peft():
    """Whether the installed PEFT is the version that the page was made with."""
    return f"peft {peft.__version__}" in PAGE.read_text(encoding="utf-8")


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
