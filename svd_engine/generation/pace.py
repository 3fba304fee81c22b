"""How many guesses are worth a pass: what passes cost, and how often guesses came true."""

import math
from collections.abc import Callable, Sequence

SLOPE = 0.25  # of a step's time per further token, until it is measured
DRIFT = 1.02  # by which a time grows before it is measured again: the machine may be busier now
HOPE = 0.995  # by which that of several tokens shrinks at each step of one: it may be less busy
FADE = 0.8  # of what is known, at each guess that is judged


class Costs:
    """Seconds of a step by its rows and its new tokens per row, as measured.

    The shortest lately counts, so that what else the machine does is left out.
    """

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int], float] = {}

    def add(self, rows: int, new: int, seconds: float) -> None:
        """Note the time of a step."""
        known = self._seconds.get((rows, new), math.inf)
        self._seconds[rows, new] = min(known * DRIFT, seconds)
        if new == 1:
            for r, q in self._seconds:
                if r == rows and q > 1:
                    self._seconds[r, q] *= HOPE

    def of(self, rows: int, new: int) -> float:
        """Return the expected time of a step, in steps of one token."""
        one = self._seconds.get((rows, 1))
        known = [q for r, q in self._seconds if r == rows and q > 1]
        if one is None or not known:
            return 1 + SLOPE * (new - 1)
        near = min(known, key=lambda q: (abs(q - new), q))
        slope = (self._seconds[rows, near] / one - 1) / (near - 1)
        return max(1.0, 1 + slope * (new - 1))


class Chance:
    """How often guesses of a kind came true lately."""

    def __init__(self, right: float, wrong: float) -> None:
        self._right, self._wrong = right, wrong

    def add(self, right: int, is_wrong: bool) -> None:
        """Note so many tokens that came true, and whether one that did not ended them."""
        fade = FADE ** (right + is_wrong)
        self._right = self._right * fade + right
        self._wrong = self._wrong * fade + is_wrong

    def of(self, tokens: int) -> float:
        """Return how many of a guess of `tokens` are expected to come true."""
        each = self._right / (self._right + self._wrong)
        return sum(each**i for i in range(1, tokens + 1))


def best(
    costs: Costs, rows: int, expected: Sequence[Callable[[int], float]], most: int
) -> tuple[int, float]:
    """Return how many guesses per row, 0 to `most`, make the most tokens per second, and the rate.

    expected: of each row, how many of so many guesses are expected to come true.
    """
    rates = [
        (rows + sum(of(k) for of in expected)) / costs.of(rows, k + 1) for k in range(most + 1)
    ]
    rate = max(rates)
    return rates.index(rate), rate
