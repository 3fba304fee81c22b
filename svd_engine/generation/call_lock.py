"""A lock that lets one call run at a time, for threads and for coroutines."""

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")
POLL = 0.1  # seconds after which one who waits looks whether waiting makes sense
# Set when the program ends, before Python waits for its threads, also for those of executors.
_ending = threading.Event()
threading._register_atexit(_ending.set)  # type: ignore[attr-defined]


@dataclass
class Owner:
    """The thread and task that hold the lock."""

    thread: threading.Thread | None  # not its number, which another thread may get later
    task: "asyncio.Task[Any] | None" = None  # of a coroutine that reads the stream

    def would_deadlock(self, other: "Owner") -> bool:
        """Whether `other` would wait for itself."""
        if self.thread is None or self.thread is not other.thread:
            return False
        return None in (self.task, other.task) or self.task is other.task


class CallLock:
    """A lock that raises RuntimeError instead of a deadlock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: Owner | None = None
        self._process = os.getpid()

    @contextmanager
    def hold(self, owner: Owner | None = None) -> Iterator[None]:
        """Wait for the lock and hold it for the owner, by default this thread."""
        owner = owner or Owner(threading.current_thread())
        self._check(owner)
        self._wait(owner)
        self._owner = owner
        try:
            yield
        finally:
            self._owner = None
            self._lock.release()

    def _wait(self, owner: Owner) -> None:
        while not self._lock.acquire(timeout=POLL):
            if owner.thread is None:
                raise RuntimeError("the stream was cancelled while it waited for another call.")
            if _ending.is_set() and self._is_forsaken():
                raise RuntimeError("the program ended with the engine's stream open; close() it.")

    def _is_forsaken(self) -> bool:
        """Whether the stream that is open belongs to the main thread, or to one that has ended."""
        thread = None if self._owner is None else self._owner.thread
        return thread is not None and (thread is threading.main_thread() or not thread.is_alive())

    def stream(self, items: Generator[T, None, None]) -> Generator[T, None, None]:
        """Yield the items; hold the lock from the first to the last, or until closed."""
        with self.hold(), closing(items):
            for item in items:
                yield item
                self._owner = Owner(threading.current_thread())  # another thread may read on

    async def astream(self, items: Generator[T, None, None]) -> AsyncGenerator[T, None]:
        """Yield the items, each computed in a worker thread when it is requested."""
        loop, thread, held = asyncio.get_running_loop(), ThreadPoolExecutor(1), ExitStack()
        owner = Owner(threading.current_thread(), asyncio.current_task())
        try:
            await loop.run_in_executor(thread, held.enter_context, self.hold(owner))
            held.enter_context(closing(items))
            while (item := await loop.run_in_executor(thread, next, items, None)) is not None:
                yield item
        finally:  # also if the task is cancelled, after the current step
            owner.thread = None  # it requests no more items, so it may wait
            try:
                thread.submit(held.close)
            except RuntimeError:  # the program ends
                held.close()
            thread.shutdown(wait=False)

    def _check(self, owner: Owner) -> None:
        """Raise RuntimeError if the owner would wait for itself, or for another process."""
        if self._process != os.getpid() and (torch.get_num_threads() > 1 or self._lock.locked()):
            raise RuntimeError(
                "the engine was made before this process was forked, and PyTorch's threads do not "
                "survive a fork: start the process with the method 'spawn', and make an engine "
                "there."
            )
        if self._owner is not None and self._owner.would_deadlock(owner):
            raise RuntimeError(
                "the engine's stream is open in this thread; exhaust it or close() it first."
            )
