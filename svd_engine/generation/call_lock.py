"""One call at a time: threads wait their turn, and a coroutine reads a stream from a thread."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class Owner:
    """Who must not wait for the turn, since it would wait for itself."""

    thread: int | None
    task: "asyncio.Task[Any] | None" = None  # where it reads the stream from a coroutine

    def would_deadlock(self, other: "Owner") -> bool:
        if self.thread is None or self.thread != other.thread:
            return False
        return None in (self.task, other.task) or self.task is other.task


class CallLock:
    """A lock that raises RuntimeError where it would wait for ever."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: Owner | None = None

    @contextmanager
    def hold(self, owner: Owner | None = None) -> Iterator[None]:
        """Wait for the turn; it is the owner's, by default the thread's."""
        owner = owner or Owner(threading.get_ident())
        self._check(owner)
        with self._lock:
            self._owner = owner
            try:
                yield
            finally:
                self._owner = None

    def stream(self, items: Generator[T, None, None]) -> Generator[T, None, None]:
        """The items, holding the turn from the first to the last or until the stream is closed."""
        with self.hold(), closing(items):
            for item in items:
                yield item
                self._owner = Owner(threading.get_ident())  # another thread may have taken it over

    async def astream(self, items: Generator[T, None, None]) -> AsyncGenerator[T, None]:
        """The items, made in a thread one after the other as they are asked for."""
        loop, thread, held = asyncio.get_running_loop(), ThreadPoolExecutor(1), ExitStack()
        owner = Owner(threading.get_ident(), asyncio.current_task())
        try:
            await loop.run_in_executor(thread, held.enter_context, self.hold(owner))
            held.enter_context(closing(items))
            while (item := await loop.run_in_executor(thread, next, items, None)) is not None:
                yield item
        finally:  # also where the task is cancelled: after the step under way
            owner.thread = None  # nothing more is asked of this thread: it may wait
            thread.submit(held.close)
            thread.shutdown(wait=False)

    def _check(self, owner: Owner) -> None:
        if self._owner is not None and self._owner.would_deadlock(owner):
            raise RuntimeError(
                "the engine's stream is open in this thread; exhaust it or close() it first."
            )
