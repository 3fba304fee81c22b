"""Readers of data files: each item comes with its file and the line where it begins."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from svd_engine.utils.files import parse_integer

_GAP = re.compile(r"[\s,]*")


def read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (where, item) of a JSON array or of JSON lines. Raises ValueError with the line."""
    text = _text(path)
    decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_int=parse_integer)
    array = text.lstrip().startswith("[")
    position, line = text.index("[") + 1 if array else 0, 1
    counted = 0
    while True:
        position = _GAP.match(text, position).end()  # type: ignore[union-attr]
        if position == len(text):
            if array:
                raise ValueError(f"{path}:{text.count(chr(10)) + 1}: the array has no end.")
            return
        if array and text[position] == "]":
            return
        line, counted = line + text.count("\n", counted, position), position
        try:
            item, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}.") from error
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from error
        except RecursionError as error:
            raise ValueError(f"{path}:{line}: it is nested too deeply.") from error
        yield f"{path}:{line}", item


def read_csv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (where, row) of a CSV file with a header."""
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    start = 2
    try:
        for row in reader:
            yield f"{path}:{start}", row
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{start}: not CSV: {error}.") from error


def texts(where: str, name: str, values: Iterable[Any]) -> list[str]:
    """Return the values; raise ValueError, prefixed with `where`, unless all are non-empty text."""
    values = list(values)
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"{where}: {name} must be text; got {value!r}.")
        if not value.strip():
            raise ValueError(f"{where}: {name} is empty.")
    return values


def distinct(where: str, answers: list[str]) -> None:
    """Raise ValueError, prefixed with `where`, if two answers are equal up to case and spaces."""
    known: set[str] = set()
    for answer in answers:
        plain = " ".join(answer.casefold().split())
        if plain in known:
            raise ValueError(f"{where}: the answer {answer!r} is there twice.")
        known.add(plain)


def _text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path} is no file." if path.exists() else f"{path} does not exist.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    distinct_keys = dict(pairs)
    if len(distinct_keys) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice!r} is there twice.")
    return distinct_keys
