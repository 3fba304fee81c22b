"""Journal: one JSON line per question as it is done, so that a killed evaluation can resume."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """An append-only file whose first line has the settings of its results.

    Raises ValueError if the file belongs to other settings, unless `overwrite`.
    """

    def __init__(
        self, path: str | Path, settings: Mapping[str, Any], overwrite: bool = False
    ) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = json.loads(json.dumps({"settings": settings}))  # tuples become lists, as in the file
        self.settings: dict[str, Any] = head["settings"]
        fingerprint = hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()
        self.results: dict[int, dict[str, Any]] = {}
        lines = [] if overwrite else whole_lines(self.path)
        if not lines:
            self.path.write_text(json.dumps({"fingerprint": fingerprint, **head}) + "\n", "utf-8")
        elif lines[0].get("fingerprint") != fingerprint:
            changes = "; ".join(_changes(lines[0].get("settings", {}), self.settings))
            raise ValueError(
                f"{self.path} holds results of other settings ({changes}). Give another --output, "
                "or --overwrite to start anew."
            )
        else:
            self.results = {line["id"]: line for line in lines[1:]}

    def add(self, results: Mapping[int, Mapping[str, Any]]) -> None:
        """Append results, keyed by the number of their question."""
        lines = [{"id": number, **result} for number, result in results.items()]
        append(self.path, lines)
        # Keep them as they will be read, so that a resumed evaluation gives the same numbers.
        self.results |= {line["id"]: json.loads(json.dumps(line)) for line in lines}


def append(path: Path, lines: list[dict[str, Any]]) -> None:
    """Append JSON lines to a file and flush them to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """Read the JSON lines of a file; truncate a partial last line, which a kill leaves behind."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    lines = []
    for number, line in enumerate(content[:whole].decode("utf-8").split("\n")[:-1], 1):
        try:
            lines.append(json.loads(line))
            if not isinstance(lines[-1], dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a result: {error}") from error
    return lines


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}: {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
