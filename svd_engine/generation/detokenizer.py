"""Incremental detokenization: whole characters, cut before a stop string."""

from collections.abc import Callable, Sequence


class Detokenizer:
    """Turns token ids into text, per token or at once, and finds stop strings.

    decode: text of token ids. `add` holds back text that may begin a stop string, and incomplete
    characters.
    """

    # tokenizers' DecodeStream does the same for Rust tokenizers only, and cannot release an
    # incomplete character after the last token.

    def __init__(
        self, decode: Callable[[list[int]], str], stop_strings: Sequence[str] = ()
    ) -> None:
        self.decode, self.stop_strings = decode, stop_strings
        self.stop_string: str | None = None  # the one found by `add`
        self._held = ""
        self._token_ids: list[int] = []
        # Text depends on the token before it: tokens [start, shown) are decoded with the new ones.
        self._start = self._shown = 0

    def add(self, token_id: int, last: bool) -> str:
        """Add one token; return the text released by it, which is all of it after the last."""
        self._token_ids.append(token_id)
        self._held += self._new_text(last)
        if found := first_stop(self._held, self.stop_strings):
            start, self.stop_string = found
            return self._held[:start]
        keep = 0 if last else _stop_prefix_length(self._held, self.stop_strings)
        shown = len(self._held) - keep
        released, self._held = self._held[:shown], self._held[shown:]
        return released

    def decode_to_stop(self, token_ids: list[int]) -> tuple[str, str | None]:
        """Text of all tokens up to the first stop string, and that string."""
        text = self.decode(token_ids)
        found = first_stop(text, self.stop_strings)
        return (text, None) if found is None else (text[: found[0]], found[1])

    def _new_text(self, last: bool) -> str:
        before = self.decode(self._token_ids[self._start : self._shown])
        text = self.decode(self._token_ids[self._start :])
        # A character may span tokens; until complete it decodes to the replacement character.
        if len(text) <= len(before) or (text.endswith("\ufffd") and not last):
            return ""
        self._start, self._shown = self._shown, len(self._token_ids)
        return text[len(before) :]


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
