"""Numbers and tables as Markdown."""

from collections.abc import Sequence
from typing import Any


def number(value: Any) -> str:
    """Format to three digits, or to all digits before the point; words stay as they are."""
    if not isinstance(value, int | float):
        return str(value) if value else "-"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table, its first column left-aligned and the others right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
