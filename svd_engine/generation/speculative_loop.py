"""The decode loop with guesses: a forward step reads several tokens of a row and verifies them."""

import time

import torch

from svd_engine.generation import pace
from svd_engine.generation.ahead import Ahead
from svd_engine.generation.assistant import Assistant
from svd_engine.generation.decode_loop import Batch, not_finite, start_fetch
from svd_engine.generation.guesses import Guess, Guesser
from svd_engine.generation.outputs import Event
from svd_engine.generation.processed import is_plain
from svd_engine.generation.request import Request
from svd_engine.generation.sequence import Sequence
from svd_engine.model.pair import Decoder
from svd_engine.model.runner import padded

REST = 64  # steps after which an assistant that was not worth it is asked again
TRY = 2  # guesses then

Places = list[tuple[int, int]]  # row, and token of the row's in the step


class SpeculativeBatch(Batch):
    """A batch whose steps append one token to a row, or several where guesses came true."""

    def __init__(self, request: Request, sequences: list[Sequence]) -> None:
        assert request.speculation is not None
        self._speculation = speculation = request.speculation
        self._guessers = [Guesser(s, speculation.looks_up) for s in sequences]
        self._assistant: Assistant | Ahead | None = None
        self._rested = 0  # steps since the assistant was asked
        super().__init__(request, sequences)
        if speculation.assistant is not None and not self.is_finished:
            self._assistant = Assistant(speculation.assistant, request, sequences)
        elif speculation.ahead is not None:
            self._assistant = Ahead(speculation.ahead, request)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Append one token or more to every sequence that is not finished; return their events."""
        self._drop_finished()
        if self._logits is not None:  # of the prompts
            return super().step()
        start, rows = time.perf_counter(), self.rows
        before = [len(sequence.token_ids) for sequence in rows]
        guesses, tried, costs = self._guess()
        if tried:
            given = [
                guess.tokens[: min(tried, guesser.room)]
                for guess, guesser in zip(guesses, self._guessers, strict=True)
            ]
            is_ahead = costs is self._speculation.assisted_costs
            ahead = self._assistant if is_ahead and isinstance(self._assistant, Ahead) else None
            events = self._verify(given, ahead or self._decoder)
        else:
            events = super().step()
        seconds = time.perf_counter() - start
        for each in [costs] if tried else self._speculation.all_costs:
            each.add(len(rows), 1 + tried, seconds)
        for guess, sequence, old in zip(guesses, rows, before, strict=True):
            guess.learn(tried, sequence.token_ids[old:])
        return events

    def _guess(self) -> tuple[list[Guess], int, pace.Costs]:
        """Guess for each row; return also how many guesses to try, and what to learn costs for."""
        speculation, rows = self._speculation, len(self.rows)
        most = min(
            speculation.most,
            self._decoder.most_new(rows) - 1,
            max(guesser.room for guesser in self._guessers),
        )
        guesses = [guesser.look_up(most) for guesser in self._guessers]
        tried, rate = pace.best(speculation.costs, rows, [g.expected for g in guesses], most)
        if self._assistant is None:
            return guesses, tried, speculation.costs
        chances = [guesser.assistants.of for guesser in self._guessers]
        asked, its_rate = pace.best(speculation.assisted_costs, rows, chances, most)
        self._rested += 1
        if its_rate <= rate:
            if self._rested < REST or most < TRY:
                return guesses, tried, speculation.costs
            asked = TRY
        self._rested = 0
        drafts = self._assistant.guess(self.rows, asked, self._seeds)
        for i, (guesser, draft) in enumerate(zip(self._guessers, drafts, strict=True)):
            is_better = guesses[i].expected(asked) <= guesser.assistants.of(asked)
            if is_better or isinstance(self._assistant, Ahead):  # which has read its own guesses
                guesses[i] = Guess(draft, guesser.assistants)
        return guesses, asked, speculation.assisted_costs

    def _verify(self, guesses: list[list[int]], reader: Decoder | Ahead) -> list[Event]:
        """Read the latest token and the guesses of each row; append what is drawn after them.

        reader: what reads them. A row's tokens end with the first that was not guessed.
        """
        device, rows = self._decoder.device, self.rows
        given = [[s.token_ids[-1], *guess] for s, guess in zip(rows, guesses, strict=True)]
        read = padded(given).to(device)
        logits = reader.step(read)
        events: list[Event] = []
        is_open, kept, is_over = [True] * len(rows), [0] * len(rows), self._request.is_over
        for places in self._rounds(given):
            places = [place for place in places if is_open[place[0]]]
            if not places:
                break
            row, column = torch.tensor(places, device=device).T
            here = tuple(x[row, column] for x in logits)
            drawn_from = self._distribution(here, [rows[r] for r, _ in places])
            drawn = self._sample(drawn_from, self._seeds[row], self._positions[row] + column)
            best = self._best(here, drawn_from)
            tokens, logprobs = start_fetch(*drawn)()
            for (r, i), token, logprob, top in zip(places, tokens, logprobs, best, strict=True):
                if not is_open[r]:
                    continue
                if token < 0:
                    raise not_finite(rows[r].all_ids)
                events.append(rows[r].append(token, logprob, top, is_over))
                kept[r] += 1
                is_open[r] = not rows[r].is_finished and given[r][i + 1 : i + 2] == [token]
        appended = torch.tensor(kept, device=device)
        self._decoder.set_back(read.shape[1] - appended)
        self._positions = self._positions + appended
        self._tokens = torch.tensor([s.token_ids[-1] for s in rows], device=device)
        return events

    def _rounds(self, given: list[list[int]]) -> list[Places]:
        """The places to draw at together.

        Constraints and processors are asked about texts that came true, one token after the other.
        """
        places = [(r, i) for r, tokens in enumerate(given) for i in range(len(tokens))]
        if is_plain(self._request):
            return [places]
        longest = max(map(len, given))
        return [[place for place in places if place[1] == i] for i in range(longest)]

    def _overlaps(self) -> bool:
        return False  # the guesses that the next step reads depend on this one's tokens

    def _drop_finished(self) -> None:
        running = [row for row, sequence in enumerate(self.rows) if not sequence.is_finished]
        if len(running) < len(self.rows):
            self._guessers = [self._guessers[row] for row in running]
            if self._assistant is not None:
                self._assistant.reorder(torch.tensor(running, device=self._decoder.device))
        super()._drop_finished()
