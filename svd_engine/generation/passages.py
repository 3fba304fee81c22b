"""Prompts and continuations of `score`, as passages of token ids."""

from collections.abc import Sequence
from typing import Any

from svd_engine.data.checks import check_messages
from svd_engine.data.tokenization import (
    Text,
    as_list,
    encode_answers,
    is_chat,
    located,
    render_answer,
    render_chat,
)
from svd_engine.generation.inputs import Inputs, is_id
from svd_engine.generation.scoring import Passage


def collect(
    inputs: Inputs, prompts: Any, continuations: Any = None, messages: Any = None
) -> list[Passage]:
    """One passage per continuation of a prompt, or per pair of a prompt and its continuation.

    Without continuations it is the prompt itself, after its first token. Raises ValueError.
    """
    if (prompts is None) == (messages is None):
        raise ValueError("give prompts or messages, one of the two.")
    if continuations is None:
        whole = inputs.prompts(prompts, messages)
        found = [Passage(ids[:1], ids[1:]) for ids in whole]
        names = [f"prompts[{i}] after its first token" for i in range(len(found))]
        inputs.check_passages(found, names)
        return found
    name = "prompts" if messages is None else "messages"
    given = prompts if messages is None else messages
    is_single = is_one(continuations)
    if not is_single:
        kind = "text, token ids or a list of these"
        continuations = as_list(continuations, "continuations", kind)
    if is_one(given) or is_chat(given):
        return _of_prompt(inputs, given, [continuations] if is_single else continuations)
    given = as_list(given, name, "text, token ids, a conversation or a list of these")
    if is_single or len(continuations) != len(given):
        raise ValueError(
            f"give one continuation for each of the {len(given)} {name}; got {continuations!r}."
        )
    found = []
    for i, (prompt, answer) in enumerate(zip(given, continuations, strict=True)):
        with located(f"{name}[{i}]"):
            found += _of_prompt(inputs, prompt, [answer])
    return found


def is_one(value: Any) -> bool:
    """Whether the value is one text or one list of token ids."""
    if isinstance(value, str):
        return True
    try:
        return is_id(value[0])
    except (TypeError, LookupError):
        return False


def _of_prompt(inputs: Inputs, prompt: Any, answers: Sequence[Text]) -> list[Passage]:
    """A prompt or conversation with each of its answers; every one begins where the prompt ends."""
    with located("prompt or continuations"):
        if is_chat(prompt):
            check_messages(prompt, "messages")
            text = render_chat(prompt, inputs.tokenizer, continued=True)
            answers = [
                render_answer(a, prompt, text, inputs.tokenizer) if isinstance(a, str) else a
                for a in answers
            ]
            start, encoded = encode_answers(
                text, answers, inputs.tokenizer, add_special_tokens=False
            )
        else:
            start, encoded = encode_answers(prompt, answers, inputs.tokenizer)
    names = [f"the continuation {a!r}" if isinstance(a, str) else "a continuation" for a in answers]
    found = [Passage(start, ids) for ids in encoded]
    inputs.check_passages(found, names)
    return found
