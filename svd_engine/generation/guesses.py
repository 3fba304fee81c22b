"""A row's guesses from its own text, and how good guesses of each kind have been."""

from svd_engine.generation.pace import Chance
from svd_engine.generation.prompt_lookup import PromptLookup
from svd_engine.generation.sequence import Sequence


class Guess:
    """What may come next in a row, and how often guesses of its kind came true."""

    def __init__(self, tokens: list[int], chance: Chance) -> None:
        self.tokens, self.chance = tokens, chance

    def expected(self, most: int) -> float:
        """Return how many of the first `most` tokens are expected to come true."""
        return self.chance.of(min(most, len(self.tokens)))

    def learn(self, tried: int, drawn: list[int]) -> None:
        """Learn from the tokens drawn, which end with the first that was not guessed."""
        pairs = zip(self.tokens[: max(tried, 1)], drawn, strict=False)
        judged = [guessed == token for guessed, token in pairs]
        if judged:
            self.chance.add(sum(judged), is_wrong=not all(judged))


class Guesser:
    """The guesses of one sequence."""

    def __init__(self, sequence: Sequence, looks_up: bool) -> None:
        self.sequence = sequence
        self.assistants = Chance(right=2.0, wrong=1.0)
        self._lookup = PromptLookup(sequence.prompt_ids) if looks_up else None
        self._looked = 0  # tokens of the completion that the look-up knows
        self._chances: dict[int, Chance] = {}  # by the length that was found

    @property
    def room(self) -> int:
        """How many guesses fit, beside the token that is drawn after them."""
        return self.sequence.max_new_tokens - len(self.sequence.token_ids) - 1

    def look_up(self, most: int) -> Guess:
        """Guess at most `most` tokens; none where the latest ones never came before."""
        if self._lookup is None:
            return Guess([], self.assistants)
        for token_id in self.sequence.token_ids[self._looked :]:
            self._lookup.add(token_id)
        self._looked = len(self.sequence.token_ids)
        tokens, length = self._lookup.guess(min(most, self.room))
        if length not in self._chances:
            self._chances[length] = Chance(right=length, wrong=4.0)
        return Guess(tokens, self._chances[length])
