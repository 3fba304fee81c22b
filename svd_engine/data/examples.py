"""Examples: reads JSON lines, checks them and turns them into token ids.

A line has `prompt` and `completion`, or chat `messages` that end with the assistant's answer. For
ranking it also has `rejected`, a list of wrong answers, and optionally `accepted`, more right ones.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from svd_engine.data.tokenization import Text, encode_chat, encode_text


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one prompt and its answers."""

    prompt: list[int]
    completion: list[int]
    accepted: tuple[list[int], ...] = ()
    rejected: tuple[list[int], ...] = ()


def read(path: str | Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines. Raises ValueError with the file and the line."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Give a file of JSON lines.")
    examples = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        check(example, f"{path}:{number}")
        examples.append(example)
    if not examples:
        raise ValueError(f"{path} holds no examples. Write one JSON object a line.")
    return examples


def check(example: Any, where: str) -> None:
    """Raise ValueError, prefixed with `where`, unless `example` is well-formed."""
    if not isinstance(example, Mapping):
        raise ValueError(f"{where}: an example is an object; got {type(example).__name__}.")
    if "messages" in example:
        messages = example["messages"]
        if not isinstance(messages, list) or len(messages) < 2:
            raise ValueError(f"{where}: messages must hold a question and an answer at least.")
        if messages[-1].get("role") != "assistant":
            raise ValueError(f"{where}: the last of messages must be the assistant's answer.")
        answers = [messages[-1].get("content")]
    else:
        for key in ("prompt", "completion"):
            if key not in example:
                raise ValueError(f"{where}: {key!r} is missing; got {sorted(example)}.")
        if not example["prompt"]:
            raise ValueError(f"{where}: prompt is empty.")
        answers = [example["completion"]]
    for key in ("accepted", "rejected"):
        more = example.get(key, [])
        if not isinstance(more, list):
            raise ValueError(f"{where}: {key} must be a list of answers; got {more!r}.")
        answers += more
    for answer in answers:
        if not answer:
            raise ValueError(f"{where}: an answer is empty.")
        if not isinstance(answer, str | list):
            raise ValueError(f"{where}: an answer is text or token ids; got {answer!r}.")


def encode(
    examples: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase | None
) -> list[Example]:
    """Turn examples, each text a string or token ids, into token ids. Raises ValueError."""
    if not examples:
        raise ValueError("examples is empty; give at least one.")

    def answer(text: Text) -> list[int]:
        return encode_text(text, tokenizer, add_special_tokens=False)

    encoded = []
    for i, example in enumerate(examples):
        check(example, f"examples[{i}]")
        if "messages" in example:
            if tokenizer is None or tokenizer.chat_template is None:
                raise ValueError(f"examples[{i}] has messages and needs a chat template.")
            *before, last = example["messages"]
            prompt = encode_chat(before, tokenizer)
            completion = last["content"]
        else:
            prompt = encode_text(example["prompt"], tokenizer, add_special_tokens=True)
            completion = example["completion"]
        answers = {
            key: tuple(answer(a) for a in example.get(key, [])) for key in ("accepted", "rejected")
        }
        encoded.append(Example(prompt, answer(completion), **answers))
    return encoded


def fingerprint(examples: Sequence[Mapping[str, Any]]) -> str:
    """Return the sha256 of the examples, independent of their file."""
    return hashlib.sha256(json.dumps(list(examples), sort_keys=True).encode()).hexdigest()
