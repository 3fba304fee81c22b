"""The terminal: where commands print, and where errors go. Text of others is never markup."""

import os
import sys
from contextlib import suppress
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text


def plain_console(**options: Any) -> Console:
    """Return a console that prints square brackets and colons as they are."""
    return Console(markup=False, emoji=False, **options)


console = plain_console()
errors = plain_console(stderr=True)


def show(renderable: RenderableType, **options: Any) -> None:
    """Print a table, or text that may be wrapped and coloured."""
    with console.capture() as shown:
        console.print(renderable, **options)
    write(shown.get())


def say(text: str) -> None:
    """Print one line as it is."""
    show(one_line(text), highlight=False, soft_wrap=True)


def write(text: str) -> None:
    """Write to standard output at once. Raises ValueError if it is full or closed."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        sys.stdout = open(os.devnull, "w")  # else Python flushes what is left, when it ends
        raise ValueError(f"standard output cannot be written: {error.strerror}") from error


def fail(error: OSError | ValueError) -> None:
    """Print an error as one line."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    line = Text.assemble(("error:", "red"), " ", one_line(text))
    with suppress(OSError):
        errors.print(line, highlight=False, soft_wrap=True)


def one_line(text: str) -> str:
    """Join the lines of a text, and escape what cannot be printed."""
    joined = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in joined)
