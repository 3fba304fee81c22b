"""Text files: UTF-8, with or without a byte order mark; lines end at \\n or \\r\\n alone."""

from pathlib import Path


def read_lines(path: str | Path) -> list[str]:
    """Read the lines of a file, without their ends. Raises ValueError with the file."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    return lines(content, str(path))


def lines(content: bytes, name: str) -> list[str]:
    """Split what was read from `name` into lines. Raises ValueError with the line.

    `str.splitlines` would also split at U+2028, U+2029, U+0085, form feeds and others, which stand
    inside of JSON texts and prompts.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name}:{number}: not UTF-8: {error.reason}.") from error
    return [line.removesuffix("\r") for line in text.split("\n")]
