"""Contamination: hashes of the prompts an adapter has seen, so that a test can refuse them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svd_engine.data.prompt_keys import prompt_key, words_key
from svd_engine.data.tokenization import Text, is_chat
from svd_engine.utils.files import read_object, write_text

FILE_NAME = "seen_prompts.json"
CALIBRATION = {"generation": "calibration", "ranking": "calibration for ranking"}  # kind by use
KINDS = ("training", *CALIBRATION.values())
SHOWN = 3


def prompts(examples: Sequence[Mapping[str, Any]]) -> list[Text]:
    """Return the prompt of each example; for chats, what was said last before the assistant."""
    return [_asked(e["messages"][:-1] if "messages" in e else e["prompt"]) for e in examples]


def record(folder: str | Path, kind: str, prompts: Sequence[Text]) -> Path:
    """Record the keys of the prompts that the adapter in `folder` saw; return the path."""
    path = Path(folder) / FILE_NAME
    write_text(path, with_kind(folder, kind, prompts))
    return path


def with_kind(folder: str | Path, kind: str, prompts: Sequence[Text]) -> str:
    """Return the record of `folder` with the keys of these prompts, as the text of its file.

    kind: one of KINDS; keys recorded earlier for the same kind are replaced.
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
    """Return kind -> indices of the prompts seen in it; kinds without a record are omitted.

    A record of an earlier version holds keys of words alone; they are compared as such.
    """
    keys = seen(folder)
    wanted = [{prompt_key(prompt), words_key(prompt)} for prompt in prompts]
    return {
        kind: [i for i, either in enumerate(wanted) if either & keys[kind]]
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


def _asked(prompt: Any) -> Text:
    """Text or token ids of a prompt; of messages, the last text that is not the assistant's."""
    if not is_chat(prompt):
        return prompt
    said = [_content(m) for m in prompt if m["role"] != "assistant"]
    return next((text for text in reversed(said) if text), json.dumps(prompt))


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return " ".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
