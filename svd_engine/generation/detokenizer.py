"""Incremental detokenization: whole characters, cut before a stop string."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import compress

from transformers import PreTrainedTokenizerBase


class Detokenizer:
    """Turns token ids into text, per token or at once, and finds stop strings.

    decode: text of token ids without special tokens. special: id -> text of the special tokens, if
    stop strings hold one: they are searched in a text with them, which is released without them.
    `add` holds back text that may begin a stop string, and incomplete characters.
    """

    # tokenizers' DecodeStream does the same for Rust tokenizers only, and cannot release an
    # incomplete character after the last token.

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop_strings: Sequence[str] = (),
        special: Mapping[int, str] | None = None,
    ) -> None:
        self.decode, self.stop_strings, self.special = decode, stop_strings, special or {}
        self.stop_string: str | None = None  # the one found by `add`
        self._held = ""
        self._visible: list[bool] = []  # of each character held: False in special tokens
        self._token_ids: list[int] = []
        # Text depends on the token before it: tokens [start, shown) are decoded with the new ones.
        self._start = self._shown = 0

    def add(self, token_id: int, last: bool) -> str:
        """Add one token; return the text released by it, which is all of it after the last."""
        self._token_ids.append(token_id)
        special = self.special.get(token_id, "")
        self._hold(self._new_text(last or bool(special)), is_visible=True)
        self._hold(special, is_visible=False)
        if found := first_stop(self._held, self.stop_strings):
            start, self.stop_string = found
            return self._release(start)
        keep = 0 if last else _stop_prefix_length(self._held, self.stop_strings)
        return self._release(len(self._held) - keep)

    def decode_to_stop(self, token_ids: list[int]) -> tuple[str, str | None]:
        """Text of all tokens up to the first stop string, and that string."""
        if self.special:
            anew = Detokenizer(self.decode, self.stop_strings, self.special)
            text = ""
            for i, token_id in enumerate(token_ids, 1):
                text += anew.add(token_id, last=i == len(token_ids))
                if anew.stop_string is not None:
                    break
            return text, anew.stop_string
        text = self.decode(token_ids)
        found = first_stop(text, self.stop_strings)
        return (text, None) if found is None else (text[: found[0]], found[1])

    def _hold(self, text: str, is_visible: bool) -> None:
        self._held += text
        self._visible += [is_visible] * len(text)

    def _release(self, end: int) -> str:
        """Take the first `end` characters, and return the visible ones."""
        text = "".join(compress(self._held[:end], self._visible))
        self._held, self._visible = self._held[end:], self._visible[end:]
        return text

    def _new_text(self, last: bool) -> str:
        before = self.decode(self._token_ids[self._start : self._shown])
        text = self.decode(self._token_ids[self._start :])
        # A character may span tokens; until complete it decodes to the replacement character.
        if len(text) <= len(before) or (text.endswith("\ufffd") and not last):
            return ""
        self._start, self._shown = self._shown, len(self._token_ids)
        return text[len(before) :]


def special_in(
    stop_strings: Sequence[str], tokenizer: PreTrainedTokenizerBase | None
) -> dict[int, str]:
    """Id -> text of the special tokens, if stop strings hold one; decoding would leave them out.

    One that no stop string holds keeps apart what stands before and after it.
    """
    if tokenizer is None or not stop_strings:
        return {}
    texts = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    with suppress(NotImplementedError):  # Mistral's own tokenizers have no others
        texts |= {id: str(token) for id, token in tokenizer.added_tokens_decoder.items()}
    if not any(text in stop for text in texts.values() for stop in stop_strings):
        return {}
    hidden = (id for id in texts if not tokenizer.decode([id], skip_special_tokens=True))
    return {id: texts[id] for id in hidden}


def first_stop(text: str, stop_strings: Sequence[str]) -> tuple[int, str] | None:
    """Start and value of the stop string that ends first in the text; of several, the longest.

    The answer does not depend on how the text was cut into tokens.
    """
    found = [(text.find(stop), stop) for stop in stop_strings]
    ends = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
    return min(ends)[1:] if ends else None


def _stop_prefix_length(text: str, stop_strings: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of a stop string."""
    longest = max((len(stop) for stop in stop_strings), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stop_strings):
            return length
    return 0
