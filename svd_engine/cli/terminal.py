"""The terminal: where commands print, and where errors go."""

from rich.console import Console

console = Console()
errors = Console(stderr=True)


def say(text: str) -> None:
    """Print one line as it is."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)
