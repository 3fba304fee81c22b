"""How much a scheduler takes at once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of a running batch and of what waits for it. Raises ValueError."""

    rows: int = 32  # sequences decoded at once
    tokens: int = 32768  # room of the KV cache: sequences times the length of the longest
    chunk: int = 64  # tokens of prompts read between two steps
    waiting: int = 1024  # prompts that may wait

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1; got {value!r}.")

    def check(self, rows: int, slots: int) -> None:
        """Raise ValueError for copies of one prompt that would never fit, `slots` tokens each."""
        if rows > self.rows:
            raise ValueError(f"{rows} completions of one prompt do not fit a batch of {self.rows}.")
        if rows * slots > self.tokens:
            raise ValueError(
                f"{rows} sequences of {slots} tokens, prompt and completion, do not fit the "
                f"{self.tokens} tokens of the batch. Shorten the prompt or lower max_new_tokens."
            )

    def fits(self, rows: int, slots: int) -> bool:
        return rows <= self.rows and rows * slots <= self.tokens

    def room(self, rows: int, slots: int, before: tuple[int, int]) -> tuple[int, int]:
        """Rows and slots to reserve where so many are needed: generous ones, if they fit."""
        rounded = min(self.rows, 1 << (rows - 1).bit_length()), -(-slots // 128) * 128
        grown = max(rounded[0], before[0]), max(rounded[1], before[1])
        return next((room for room in (grown, rounded) if self.fits(*room)), (rows, slots))
