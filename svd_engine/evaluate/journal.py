"""Journal: one JSON line per question as it is done, so that a killed evaluation can resume."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from svd_engine.utils.files import check_place, naming, parse_object, write_text


class Journal:
    """An append-only file whose first line has the settings of its results.

    Raises ValueError if the file belongs to other settings, unless `overwrite`. of_first: the
    settings of the first questions alone; results of these are gone on from.
    """

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any],
        overwrite: bool = False,
        of_first: Callable[[int], Mapping[str, Any]] | None = None,
    ) -> None:
        self.path = Path(path)
        check_place(self.path)
        head = _head(settings)
        self.settings: dict[str, Any] = head["settings"]
        self.results: dict[int, dict[str, Any]] = {}
        self._lines: dict[int, int] = {}  # number of a question -> its line
        lines = [] if overwrite else whole_lines(self.path)
        self._head = json.dumps(head) + "\n"
        self._is_new = not lines
        if self._is_new:
            return
        if lines[0].get("fingerprint") != head["fingerprint"]:
            kept = lines[0].get("settings")
            if not isinstance(kept, dict):
                raise ValueError(f"{self.path}:1: not the settings of results.")
            first = kept.get("questions")
            if of_first and type(first) is int and 0 < first < self.settings["questions"]:
                if _head(of_first(first))["fingerprint"] == lines[0].get("fingerprint"):
                    self._read(lines[1:])
                    rest = "".join(json.dumps(line) + "\n" for line in lines[1:])
                    write_text(self.path, self._head + rest)
                    return
            changes = "; ".join(_changes(kept, self.settings))
            raise ValueError(
                f"{self.path} holds results of other settings ({changes}). Give another --output, "
                "or --overwrite to start anew."
            )
        self._read(lines[1:])

    def _read(self, lines: list[dict[str, Any]]) -> None:
        questions = self.settings.get("questions", math.inf)
        for number, line in enumerate(lines, 2):
            which = line.get("id")
            if type(which) is not int or not 0 <= which < questions:
                raise ValueError(f"{self.path}:{number}: id is not the number of a question.")
            self.results[which], self._lines[which] = line, number

    def where(self, question: int) -> str:
        """File, and line if it was read, of the result of a question."""
        line = self._lines.get(question)
        return str(self.path) if line is None else f"{self.path}:{line}"

    def add(self, results: Mapping[int, Mapping[str, Any]]) -> None:
        """Append results, keyed by the number of their question."""
        if self._is_new:  # not before there is a result
            write_text(self.path, self._head)
            self._is_new = False
        lines = [{"id": number, **result} for number, result in results.items()]
        append(self.path, lines)
        # Keep them as they will be read, so that a resumed evaluation gives the same numbers.
        self.results |= {line["id"]: json.loads(json.dumps(line)) for line in lines}


def _head(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The first line: the settings, with tuples as lists as they are read, and their hash."""
    head = json.loads(json.dumps({"settings": settings}))
    fingerprint = hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()
    return {"fingerprint": fingerprint, **head}


def append(path: Path, lines: list[dict[str, Any]]) -> None:
    """Append JSON lines to a file and flush them to disk."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """Read the JSON lines of a file; truncate a partial last line, which a kill leaves behind.

    Raises ValueError with file and line for one that is no object.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    lines = []
    for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
        try:
            lines.append(parse_object(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a result: {error}") from error
    if whole < len(content):
        os.truncate(path, whole)
    return lines


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}: {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
