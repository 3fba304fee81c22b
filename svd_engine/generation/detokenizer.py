"""The text of a row as its tokens come: whole characters, cut before a stop string."""

from collections.abc import Callable, Sequence


class Detokenizer:
    """Gives out the text that each token adds, and sees where a stop string is complete.

    decode: text of token ids. What may be the beginning of a stop string, or a part of a character,
    is held back until it is known.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self.stop: str | None = None
        self._decode, self._stops = decode, stops
        self._held = ""
        self._tokens: list[int] = []
        # Text depends on the token before it: tokens [start, shown) are decoded with the new ones.
        self._start = self._shown = 0

    def add(self, token: int, last: bool) -> str:
        """The text that may be given out after one more token; all of it after the last."""
        self._tokens.append(token)
        self._held += self._piece(last)
        if found := first_stop(self._held, self._stops):
            start, self.stop = found
            return self._held[:start]
        keep = 0 if last else _beginning(self._held, self._stops)
        given, self._held = self._held[: len(self._held) - keep], self._held[-keep:] if keep else ""
        return given

    def _piece(self, last: bool) -> str:
        before = self._decode(self._tokens[self._start : self._shown])
        text = self._decode(self._tokens[self._start :])
        # A character may span tokens; until whole it decodes to the replacement mark.
        if len(text) <= len(before) or (text.endswith("\ufffd") and not last):
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return text[len(before) :]


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where a stop string begins, and which: the one complete first, the longest of those.

    So the answer does not depend on how the text was cut into tokens.
    """
    found = [(text.find(stop), stop) for stop in stops]
    ends = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
    return min(ends)[1:] if ends else None


def _beginning(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
