"""Examples: reads JSON lines, checks them and turns them into token ids.

A line has `prompt` and `completion`, or chat `messages` that end with the assistant's answer. For
ranking it also has `rejected`, a list of wrong answers, and optionally `accepted`, more right ones.
A prompt is text, token ids or messages; an answer is text, token ids or, after messages, a list of
one message of the assistant.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from svd_engine.data.checks import ANSWERS, answers_of, check_example
from svd_engine.data.text_files import read_lines
from svd_engine.data.tokenization import (
    Text,
    encode_answers,
    is_chat,
    located,
    render_answer,
    render_chat,
)


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one prompt and its answers."""

    prompt: list[int]
    completion: list[int]
    accepted: tuple[list[int], ...] = ()
    rejected: tuple[list[int], ...] = ()


class Line(dict[str, Any]):
    """The example of a line, which knows its file and line."""

    where: str


def read(path: str | Path) -> list[Line]:
    """Read a file of JSON lines. Raises ValueError with the file and the line."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Give a file of JSON lines.")
    examples = []
    for number, text in enumerate(read_lines(path), 1):
        if not text.strip():
            continue
        where = f"{path}:{number}"
        try:
            example = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        check_example(example, where)
        line = Line(example)
        line.where = where
        examples.append(line)
    if not examples:
        raise ValueError(f"{path} holds no examples. Write one JSON object a line.")
    return examples


def place(example: Mapping[str, Any], number: int) -> str:
    """Return where an example comes from: its file and line, or its index."""
    return example.where if isinstance(example, Line) else f"examples[{number}]"


def encode(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int | None = None,
) -> list[Example]:
    """Turn examples into token ids, all of which are below `vocab_size`.

    Raises ValueError with the file and line of an example, or its index.
    """
    if not hasattr(examples, "__len__"):
        raise ValueError(f"examples must be a list; got {type(examples).__name__}.")
    if not len(examples):
        raise ValueError("examples is empty; give at least one.")
    for i, example in enumerate(examples):
        check_example(example, place(example, i))
    encoded = []
    for i, example in enumerate(examples):
        with located(place(example, i)):
            encoded.append(_encode(example, tokenizer, vocab_size))
    return encoded


def fingerprint(examples: Sequence[Mapping[str, Any]]) -> str:
    """Return the sha256 of the examples, independent of their file."""
    plain = [dict(example) for example in examples]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _encode(
    example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, vocab_size: int | None
) -> Example:
    prompt: Any
    if "messages" in example:
        *prompt, last = example["messages"]
        completion = [last]
    else:
        prompt, completion = example["prompt"], example["completion"]
    more = [answers_of(example.get(key, [])) for key in ANSWERS]
    answers: list[Text] = [_text(answer) for answer in (completion, *more[0], *more[1])]
    if is_chat(prompt):
        # `messages` are whole turns; a `prompt` may end in the beginning of the answer.
        text = render_chat(prompt, tokenizer, continued="messages" not in example)
        written = [
            render_answer(answer, prompt, text, tokenizer) if isinstance(answer, str) else answer
            for answer in answers
        ]
        ids, (first, *rest) = encode_answers(text, written, tokenizer, add_special_tokens=False)
    else:
        ids, (first, *rest) = encode_answers(prompt, answers, tokenizer)
    for name, tokens in (("prompt", ids), *(("an answer", answer) for answer in (first, *rest))):
        if not tokens:
            raise ValueError(f"{name} has no tokens.")
        if min(tokens) < 0 or (vocab_size is not None and max(tokens) >= vocab_size):
            raise ValueError(
                f"{name} has token ids from {min(tokens)} to {max(tokens)}; the vocabulary has "
                f"{vocab_size}."
            )
    accepted = len(more[0])
    return Example(ids, first, tuple(rest[:accepted]), tuple(rest[accepted:]))


def _text(answer: Any) -> Text:
    """Text or token ids of an answer, which may be a list of one message."""
    return answer[0]["content"] if is_chat(answer) else answer
