"""How many guesses are worth a pass: what passes cost, and how often guesses came true."""

from collections.abc import Callable, Sequence

SLOPE = 0.25  # of a step's time per further token, until it is measured
LATEST = 0.2  # weight of the latest measurement
HOPE = 0.002  # by which a slope nears SLOPE at a step of one token: the machine may be less busy
FADE = 0.8  # of what is known, at each guess that is judged


class Costs:
    """What further tokens of a row add to the time of a step, by rows, as measured."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}  # of a step of one token, by rows
        self._slopes: dict[int, float] = {}  # of steps of several, per further token

    def add(self, rows: int, new: int, seconds: float) -> None:
        """Note the time of a step."""
        slope = self._slopes.get(rows, SLOPE)
        if new == 1:
            one = self._seconds.get(rows, seconds)
            self._seconds[rows] = one + LATEST * (seconds - one)
            self._slopes[rows] = slope + HOPE * (SLOPE - slope)
        elif rows in self._seconds:
            found = max(0.0, seconds / self._seconds[rows] - 1) / (new - 1)
            self._slopes[rows] = slope + LATEST * (found - slope)

    def of(self, rows: int, new: int) -> float:
        """Return the expected time of a step, in steps of one token."""
        return 1 + self._slopes.get(rows, SLOPE) * (new - 1)


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
