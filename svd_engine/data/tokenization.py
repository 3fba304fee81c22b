"""Texts and chats to token ids; an answer is encoded together with its prompt."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from operator import index
from reprlib import repr as short  # of what may be long or deep
from typing import Any

from transformers import PreTrainedTokenizerBase

Text = str | Sequence[int]  # or token ids
Chat = Sequence[Mapping[str, Any]]  # messages of role and content


@contextmanager
def located(where: str) -> Iterator[None]:
    """Prefix a ValueError of the block with the place of what is wrong."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def encode_prompt(prompt: Text, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Token ids of a prompt; token ids are returned as they are. Raises ValueError.

    A text begins with what the tokenizer puts before every text, such as a beginning-of-sequence
    token. What it puts after a text is left out: the text goes on.
    """
    if not isinstance(prompt, str):
        return token_ids(prompt)
    return _prefix(prompt, tokenizer) + _encode([prompt], tokenizer)[0]


def encode_answers(
    prompt: Text,
    answers: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    add_special_tokens: bool = True,
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt and of each answer to it. Raises ValueError.

    Prompt and answer are encoded as one text, and split where the prompt ends. If a token spans the
    end, as one that begins with the prompt's last space, it belongs to the answer. The prompt ends
    at the same place for all answers, so that their log-probabilities can be compared.
    add_special_tokens: begin a text as `encode_prompt` does; False for a rendered chat.
    """
    ids = None if isinstance(prompt, str) else token_ids(prompt)
    if ids is not None and not any(isinstance(answer, str) for answer in answers):
        return ids, [token_ids(a) for a in answers if not isinstance(a, str)]
    text, start = (prompt, []) if isinstance(prompt, str) else _text_of(ids or [], tokenizer)
    if ids is None and add_special_tokens:
        start = _prefix(text, tokenizer)
    texts = [text + answer for answer in answers if isinstance(answer, str)]
    own, *together = ([*start, *tokens] for tokens in _encode([text, *texts], tokenizer))
    if ids is not None and own != ids:
        raise ValueError(
            f"the prompt's token ids are not those of its text {short(text)}, so answers cannot be "
            "encoded with it; give prompt and answers both as text or both as token ids."
        )
    rest = iter(together)
    wholes = [next(rest) if isinstance(a, str) else [*own, *token_ids(a)] for a in answers]
    end = min((_shared(own, whole) for whole in wholes), default=len(own))
    return own[:end], [whole[end:] for whole in wholes]


def render_chat(
    messages: Chat, tokenizer: PreTrainedTokenizerBase | None, *, continued: bool = False
) -> str:
    """Text of a conversation by the chat template, up to where the assistant answers.

    continued: go on with the last message, if it is the assistant's, instead of opening a new turn.
    Raises ValueError where there is no template, or the template refuses the conversation.
    """
    if tokenizer is None or tokenizer.chat_template is None:
        raise ValueError("a conversation needs a chat template; the tokenizer has none.")
    continued = continued and messages[-1].get("role") == "assistant"
    try:
        text: Any = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=not continued,
            continue_final_message=continued,
            tokenize=False,
        )
    except Exception as error:  # a template is a program: it raises what it likes
        refused = "continue the assistant's last message" if continued else "render the messages"
        reason = " ".join(str(error).split())
        raise ValueError(f"the chat template cannot {refused}: {reason}") from error
    return str(text)


def render_answer(
    answer: str, messages: Chat, rendered: str, tokenizer: PreTrainedTokenizerBase | None
) -> str:
    """Text of an answer as the chat template writes it after the `rendered` messages.

    Some templates put a space before an answer or strip it; one that does more is not followed.
    """
    if messages[-1].get("role") == "assistant":
        return answer
    turn = {"role": "assistant", "content": answer}
    try:
        whole = render_chat([*messages, turn], tokenizer, continued=True)
    except ValueError:
        return answer
    text = whole.removeprefix(rendered)
    return text if text != whole and text.strip() == answer.strip() else answer


def encode_chat(messages: Chat, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Token ids of a conversation; the assistant answers, or continues its own last message."""
    return _encode([render_chat(messages, tokenizer, continued=True)], tokenizer)[0]


def is_chat(value: Any) -> bool:
    """Whether the value is a list of messages rather than text or token ids."""
    return isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], Mapping)


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]]:
    """Token ids of the texts alone."""
    if tokenizer is None:
        raise ValueError("text needs a tokenizer; pass one to the engine or give token ids.")
    for text in texts:
        check_unicode(text)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def check_unicode(text: str) -> None:
    """Raise ValueError for half of a surrogate pair, which no encoding can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text {short(text)} is not Unicode: {error.reason}.") from error


def _prefix(text: str, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Token ids that the tokenizer puts before a text."""
    if tokenizer is None:
        raise ValueError("text needs a tokenizer; pass one to the engine or give token ids.")
    if not getattr(tokenizer, "is_fast", False):
        whole = tokenizer.build_inputs_with_special_tokens([-1])
        return whole[: whole.index(-1)]
    check_unicode(text)
    encoded = tokenizer(text)
    if 0 not in encoded.sequence_ids():  # a text without tokens does not tell before from after
        encoded = tokenizer("a")
    before = takewhile(lambda place: place is None, encoded.sequence_ids())
    return encoded["input_ids"][: len(list(before))]


def _text_of(ids: list[int], tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, list[int]]:
    """The text of token ids, and the ids before it."""
    start = _prefix("", tokenizer)
    start = start if ids[: len(start)] == start else []
    assert tokenizer is not None
    try:
        text = tokenizer.decode(ids[len(start) :], clean_up_tokenization_spaces=False)
    except OverflowError as error:
        raise ValueError(f"token ids must be of the vocabulary; got {_line(ids)}.") from error
    return str(text), start


def token_ids(values: Sequence[int]) -> list[int]:
    """Plain integers of token ids. Raises ValueError for anything else."""
    try:
        return [index(value) for value in as_list(values, "token ids")]
    except TypeError as error:
        raise ValueError(f"token ids must be integers; got {_line(values)}.") from error


def as_list(values: Any, name: str, kind: str = "a list") -> list[Any]:
    """Return the items of a list, tuple, array or tensor. Raises ValueError for anything else.

    kind: what the error says that the values may be.
    """
    try:
        if isinstance(values, str | bytes | bytearray | Mapping) or not len(values) >= 0:
            raise TypeError
        items = list(values)
    except TypeError as error:
        raise ValueError(f"{name} must be {kind}; got {_line(values)}.") from error
    if any(isinstance(item, bool) for item in items):
        raise ValueError(f"{name} must hold no booleans; got {_line(values)}.")
    return items


def _line(value: Any) -> str:
    """A short representation of a value in one line."""
    return " ".join(short(value).split())


def _shared(one: list[int], other: list[int]) -> int:
    """The number of first tokens that are the same."""
    same = (a == b for a, b in zip(one, other, strict=False))
    return sum(takewhile(bool, same))
