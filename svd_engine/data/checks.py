"""Checks of examples: texts, token ids and messages, before anything is made of them."""

import json
from collections.abc import Mapping, Sequence
from reprlib import repr as short  # of what may be long or deep
from typing import Any

from svd_engine.data.tokenization import check_unicode, is_chat, located

ANSWERS = ("accepted", "rejected")


def check_example(example: Any, where: str) -> None:
    """Raise ValueError, prefixed with `where`, unless `example` is well-formed."""
    if not isinstance(example, Mapping):
        raise ValueError(f"{where}: an example is an object; got {type(example).__name__}.")
    try:
        json.dumps(dict(example), sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: an example must hold JSON values: {error}.") from error
    with located(where):
        if "messages" in example:
            messages = example["messages"]
            if not isinstance(messages, list | tuple) or len(messages) < 2:
                raise ValueError("messages must hold a question and an answer at least.")
            check_messages(messages, "messages")
            if messages[-1]["role"] != "assistant":
                raise ValueError("the last of messages must be the assistant's answer.")
            prompt, answers = messages[:-1], [messages[-1:]]
        else:
            for key in ("prompt", "completion"):
                if key not in example:
                    raise ValueError(f"{key!r} is missing; got {sorted(example)}.")
            prompt, answers = example["prompt"], [example["completion"]]
            if is_chat(prompt):
                check_messages(prompt, "prompt")
            else:
                check_text(prompt, "prompt")
        for key in ANSWERS:
            more = example.get(key, [])
            if not isinstance(more, list | tuple):
                raise ValueError(f"{key} must be a list of answers; got {short(more)}.")
            answers += answers_of(more)
        for answer in answers:
            check_answer(answer, after_messages=is_chat(prompt))


def answers_of(value: Sequence[Any]) -> list[Any]:
    """Return a list of answers; a list of messages is one answer."""
    return [value] if is_chat(value) else list(value)


def check_text(value: Any, name: str) -> None:
    """Raise ValueError unless the value is text or a list of token ids, and not empty."""
    if not isinstance(value, str | list | tuple):
        raise ValueError(f"{name} is text or token ids; got {short(value)}.")
    if not value:
        raise ValueError(f"{name} is empty.")
    if isinstance(value, str):
        check_unicode(value)
        return
    for token in value:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ValueError(
                f"{name} is text or token ids; one of its token ids is {short(token)}."
            )


def check_messages(messages: Any, name: str) -> None:
    """Raise ValueError unless every message has a role and, as content, text or a list of parts.

    A message that calls tools may have no content.
    """
    for i, message in enumerate(messages):
        where = f"{name}[{i}]"
        if not isinstance(message, Mapping):
            raise ValueError(
                f"{where} must be {{'role': ..., 'content': ...}}; got {short(message)}."
            )
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise ValueError(f"{where}: role must be text; got {short(role)}.")
        if content is None and message.get("tool_calls"):
            continue
        if isinstance(content, str):
            check_unicode(content)
        elif not isinstance(content, list | tuple) or not is_chat(content):
            raise ValueError(f"{where}: content must be text; got {short(content)}.")


def check_answer(answer: Any, after_messages: bool) -> None:
    """Raise ValueError unless the answer is text, token ids or one message of the assistant.

    Only an answer `after_messages` may be a message.
    """
    if not is_chat(answer):
        check_text(answer, "an answer")
        return
    if not after_messages:
        raise ValueError("an answer of messages needs a prompt of messages.")
    check_messages(answer, "an answer")
    if len(answer) != 1 or answer[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in answer)
        raise ValueError(f"an answer is one message of the assistant; got {roles}.")
    if not isinstance(answer[0]["content"], str) or not answer[0]["content"]:
        raise ValueError("an answer is empty: the assistant's content must be text.")
