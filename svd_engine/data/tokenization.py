"""Texts and chats to token ids."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

Text = str | Sequence[int]  # or token ids


def encode_text(
    text: Text, tokenizer: PreTrainedTokenizerBase | None, *, add_special_tokens: bool
) -> list[int]:
    """Token ids of a text; token ids are returned as they are.

    add_special_tokens: add what the tokenizer puts before a text. Raises ValueError for a text
    without a tokenizer.
    """
    if not isinstance(text, str):
        return [int(token) for token in text]
    if tokenizer is None:
        raise ValueError("text needs a tokenizer; pass one to the engine or give token ids.")
    return tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]


def encode_chat(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Token ids of a conversation by the chat template, up to where the assistant answers."""
    text: Any = tokenizer.apply_chat_template(
        messages,  # type: ignore[arg-type]
        add_generation_prompt=True,
        tokenize=False,
    )
    return encode_text(str(text), tokenizer, add_special_tokens=False)
