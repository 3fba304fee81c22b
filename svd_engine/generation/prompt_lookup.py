"""Guesses from the text itself: what followed the latest tokens where they came before."""

from collections.abc import Iterable

LENGTHS = 6, 4, 3, 2  # of the n-grams that are looked up, the longest first


class PromptLookup:
    """The n-grams of one text, prompt and completion, and what followed each of them last."""

    def __init__(self, token_ids: Iterable[int]) -> None:
        self._ids: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}  # n-gram -> place of the token after it
        for token_id in token_ids:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        """Add the text's next token."""
        ids = self._ids
        for n in LENGTHS:
            if len(ids) >= n:
                self._follows[tuple(ids[-n:])] = len(ids)
        ids.append(token_id)

    def guess(self, most: int) -> tuple[list[int], int]:
        """Return at most `most` tokens, and how many of the text's latest tokens they followed.

        A guess that reaches the end of the text goes on in itself, so that a period repeats.
        """
        for n in LENGTHS:
            start = self._follows.get(tuple(self._ids[-n:]))
            if start is None:
                continue
            guess: list[int] = []
            for place in range(start, start + most):
                past = place - len(self._ids)
                guess.append(self._ids[place] if past < 0 else guess[past])
            return guess, n
        return [], 0
