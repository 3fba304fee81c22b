"""The events of a submitted request, for threads and for coroutines."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

from svd_engine.generation.outputs import Completion, Event
from svd_engine.generation.request import Request
from svd_engine.generation.sequence import Sequence


class Stream:
    """Yields a request's events as the scheduler puts them, in `for` or in `async for`.

        with engine.submit(prompt, max_new_tokens=64) as stream:
            for event in stream:
                print(event.text, end="")

    One reader at a time. It raises what ended the request, if something did. Leaving the `with`
    block cancels what is not finished; `completions` waits for the end instead.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.is_cancelled = self.has_failed = False
        self.engine: object = None  # lives as long as its stream
        self._unfinished = sum(not sequence.is_finished for sequence in request.sequences)
        self._items: SimpleQueue[Event | Exception | None] = SimpleQueue()
        self._is_over = False  # its reader has seen the end
        self._wake: Callable[[], None] = lambda: None
        self._start = time.perf_counter()
        if self._unfinished == 0:
            self.end()

    def put(self, event: Event) -> None:
        """Hand an event to the reader, and the end after the last one."""
        sequence = self.request.sequences[event.row]
        if len(sequence.token_ids) == 1:
            sequence.seconds_to_first_token = time.perf_counter() - self._start
        self._items.put(event)
        if sequence.is_finished:
            self._count(sequence)
        else:
            self._wake()

    def give_up(self, sequence: Sequence) -> None:
        """Finish a sequence for which there is no time."""
        sequence.finish("time")
        self._count(sequence)

    def _count(self, sequence: Sequence) -> None:
        """Count a sequence as finished, and end after the last one."""
        sequence.seconds = time.perf_counter() - self._start
        self._unfinished -= 1
        if self._unfinished == 0:
            self.end()
        else:
            self._wake()

    def end(self, error: Exception | None = None) -> None:
        """Let the reader stop, or raise the error, after the events that it has not read."""
        self.has_failed |= error is not None
        self._items.put(error)
        self._wake()

    def cancel(self) -> None:
        """Stop decoding the request before the next step. May be called from any thread."""
        self.is_cancelled = True

    def completions(self) -> list[Completion]:
        """Wait for the end; return one completion per sequence, in order."""
        for _ in self:
            pass
        return self.finished()

    def finished(self) -> list[Completion]:
        """The completions, for a reader who has seen the end."""
        return [sequence.completion(self.request.model) for sequence in self.request.sequences]

    async def acompletions(self) -> list[Completion]:
        """`completions` for coroutines."""
        async for _ in self:
            pass
        return self.finished()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Event:
        item = None if self._is_over else self._items.get()
        return self._read(item, StopIteration)

    def __aiter__(self) -> "Stream":
        loop, self._ready = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop is closed, and nobody reads
                loop.call_soon_threadsafe(self._ready.set)

        self._wake = wake
        return self

    async def __anext__(self) -> Event:
        while not self._is_over:
            self._ready.clear()  # before looking, so that what comes after sets it
            with suppress(Empty):
                return self._read(self._items.get_nowait(), StopAsyncIteration)
            await self._ready.wait()
        raise StopAsyncIteration

    def _read(self, item: Event | Exception | None, stop: type[Exception]) -> Event:
        if isinstance(item, Event):
            return item
        self._is_over = True
        raise stop if item is None else item
