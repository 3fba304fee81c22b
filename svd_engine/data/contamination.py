"""Contamination: hashes of the prompts an adapter has seen, so that a test can refuse them."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svd_engine.utils.files import read_object, write_text

FILE_NAME = "seen_prompts.json"
KINDS = ("training", "calibration")
SHOWN = 3
Text = str | Sequence[int]


def prompt_key(text: Text) -> str:
    """Return 16 hex digits of sha256 of the question, without case, spaces and punctuation.

    A question has the same key inside `Q: ... A:`, after solved examples, and in a template with
    `### Instruction:`. Token ids are hashed as they are.
    """
    if not isinstance(text, str):
        return _digest(json.dumps([int(token) for token in text]))
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", _question(text)).casefold())
    return _digest(" ".join(words) or text)  # a prompt may be only punctuation


def prompts(examples: Sequence[Mapping[str, Any]]) -> list[Text]:
    """Return the prompt of each example; for chats, the last message before the answer."""
    return [e["messages"][-2]["content"] if "messages" in e else e["prompt"] for e in examples]


def record(folder: str | Path, kind: str, prompts: Sequence[Text]) -> Path:
    """Record the keys of the prompts that the adapter in `folder` saw; return the path."""
    path = Path(folder) / FILE_NAME
    write_text(path, with_kind(folder, kind, prompts))
    return path


def with_kind(folder: str | Path, kind: str, prompts: Sequence[Text]) -> str:
    """Return the record of `folder` with the keys of these prompts, as the text of its file.

    kind: "training" or "calibration"; keys recorded earlier for the same kind are replaced.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}.")
    keys = {**seen(folder), kind: {prompt_key(prompt) for prompt in prompts}}
    return json.dumps({k: sorted(v) for k, v in keys.items()}, indent=1) + "\n"


def seen(folder: str | Path) -> dict[str, set[str]]:
    """Return kind -> keys of the prompts seen; empty without a record. Raises ValueError."""
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return {}
    keys = read_object(path, "a record of prompts")
    for kind, found in keys.items():
        if not isinstance(found, list) or not all(isinstance(key, str) for key in found):
            raise ValueError(f"{path} is not a record of prompts: {kind} must be a list of texts.")
    return {kind: set(found) for kind, found in keys.items()}


def found(
    folder: str | Path, prompts: Sequence[Text], against: Sequence[str] = KINDS
) -> dict[str, list[int]]:
    """Return kind -> indices of the prompts seen in it; kinds without a record are omitted."""
    keys = seen(folder)
    wanted = [prompt_key(prompt) for prompt in prompts]
    return {
        kind: [i for i, key in enumerate(wanted) if key in keys[kind]]
        for kind in against
        if kind in keys
    }


def check(folder: str | Path, prompts: Sequence[Text], against: Sequence[str] = KINDS) -> None:
    """Raise ValueError, with the first matches, if any prompt was seen in the kinds `against`."""
    for kind, indices in found(folder, prompts, against).items():
        if indices:
            first = "; ".join(repr(str(prompts[i])[:80]) for i in indices[:SHOWN])
            raise ValueError(
                f"{len(indices)} of {len(prompts)} prompts were seen in {kind} "
                f"({Path(folder) / FILE_NAME}): {first}. Take them out of one of the two."
            )


def _question(prompt: str) -> str:
    """Strip an instruction template or solved examples from around the question."""
    if "### Instruction:" in prompt:
        prompt = prompt.partition("### Instruction:")[2].partition("### Response:")[0]
    before, _, last = ("\n" + prompt.strip()).rpartition("\n")
    if last == "A:" and "\nQ:" in before:
        return before.rpartition("\nQ:")[2]
    return prompt


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
