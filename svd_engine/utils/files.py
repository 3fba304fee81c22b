"""Files: JSON whose errors name the file, and writes that are whole or not at all."""

import errno
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MOST_DIGITS = 40  # transformers writes 1e30 as an integer, for "no limit"


def parse_integer(digits: str) -> int:
    """Parse an integer of JSON. Raises ValueError for one that can only be an attack."""
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"an integer has {len(digits)} digits.")
    return int(digits)


def parse_object(text: bytes) -> dict[str, Any]:
    """Parse one JSON object. Raises ValueError for anything else."""
    try:
        value = json.loads(text.decode("utf-8-sig"), parse_int=parse_integer)
    except RecursionError as error:
        raise ValueError("it is nested too deeply.") from error
    if not isinstance(value, dict):
        raise ValueError(f"an object is needed; got {type(value).__name__}.")
    return value


def read_object(path: Path, what: str) -> dict[str, Any]:
    """Read a file of one JSON object; `what` says, after "is not", what it should be.

    Raises ValueError that names the file.
    """
    try:
        return parse_object(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not {what}: {error}") from error


def check_place(path: Path) -> None:
    """Raise ValueError unless the folders above `path` are folders, or can be made."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"{path} cannot be written: {above} is a file.")


def write_text(path: Path, text: str) -> None:
    """Write a temporary file and rename it to `path`: readers see the old file or the new one."""
    write_together({path: text.encode("utf-8")})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write several files: rename none before all are written; OSErrors name the file."""
    written: dict[Path, str] = {}
    try:
        for path, content in contents.items():
            with naming(path):
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                path.parent.mkdir(parents=True, exist_ok=True)
                handle, written[path] = tempfile.mkstemp(dir=path.parent, prefix=".writing.")
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                os.chmod(written[path], 0o644)
        for path in contents:
            with naming(path):
                os.replace(written[path], path)
            del written[path]
    finally:
        for temporary in written.values():
            os.unlink(temporary)


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Let an OSError inside name `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error
