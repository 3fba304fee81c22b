"""Processes end, and engines do not travel between them."""

import asyncio
import copy
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.generation.call_lock import CallLock
from tests.tiny import tiny_peft

# Programs with the lock of an engine and streams of numbers, as an engine has them.
START = """
import asyncio, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from svd_engine.generation.call_lock import CallLock

lock = CallLock()

def numbers():
    yield from range(5)

def call():
    with lock.hold():
        print("held", flush=True)

async def astream():
    async for _ in lock.astream(numbers()):
        pass
"""
PROGRAMS = {
    "a thread waits": """
        stream = lock.stream(numbers()); next(stream)
        threading.Thread(target=call).start()
        """,
    "a thread of an executor waits": """
        stream = lock.stream(numbers()); next(stream)
        ThreadPoolExecutor(1).submit(call)
        """,
    "the thread with the stream has ended": """
        stream = lock.stream(numbers())
        one = threading.Thread(target=lambda: next(stream)); one.start(); one.join()
        threading.Thread(target=call).start()
        """,
    "an asynchronous stream waits": """
        stream = lock.stream(numbers()); next(stream)
        threading.Thread(target=lambda: asyncio.run(astream())).start()
        """,
    "an asynchronous stream is left open": """
        loop = asyncio.new_event_loop()
        stream = lock.astream(numbers())
        loop.run_until_complete(anext(stream))
        threading.Thread(target=call).start()
        """,
    "asyncio.wait_for around a second stream": """
        async def main():
            first = lock.astream(numbers())
            await anext(first)
            try:
                await asyncio.wait_for(asyncio.create_task(astream()), 0.2)
            except TimeoutError:
                print("timeout", flush=True)
        asyncio.run(main())
        """,
    "the same, with the first one open": """
        loop = asyncio.new_event_loop()
        first = lock.astream(numbers())
        loop.run_until_complete(anext(first))
        try:
            loop.run_until_complete(asyncio.wait_for(astream(), 0.2))
        except TimeoutError:
            print("timeout", flush=True)
        """,
}


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_the_program_ends(program):
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", START + textwrap.dedent(program)],
        capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "held" not in done.stdout
    assert time.monotonic() - started < 60
    assert "timeout" in done.stdout or "wait_for" not in program


def test_another_thread_may_finish_the_stream_of_an_ended_one():
    lock, got = CallLock(), []
    stream = lock.stream(iter_numbers())
    one = threading.Thread(target=lambda: got.append(next(stream)))
    one.start()
    one.join()
    waiting = threading.Thread(target=lambda: lock.hold().__enter__())
    waiting.start()
    time.sleep(0.25)
    assert waiting.is_alive()
    assert got + list(stream) == [0, 1, 2]
    waiting.join(30)
    assert not waiting.is_alive()


def iter_numbers():
    yield from range(3)


def test_a_cancelled_wait_leaves_the_lock_usable():
    lock = CallLock()

    async def read():
        return [item async for item in lock.astream(iter_numbers())]

    async def main():
        first = lock.astream(iter_numbers())
        await anext(first)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.create_task(read()), 0.05)
        await first.aclose()
        return await asyncio.wait_for(asyncio.create_task(read()), 30)

    assert asyncio.run(main()) == [0, 1, 2]


def in_a_fork(function):
    """What the function returns in a forked process, as text."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = str(function())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    killer = threading.Timer(30, os.kill, (child, signal.SIGKILL))
    killer.start()
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    killer.cancel()
    return said


@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child(monkeypatch, threads):
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    lock = CallLock()

    def call():
        with lock.hold():
            return "held"

    refusal = "RuntimeError: the engine was made before this process was forked"
    assert in_a_fork(call).startswith("held" if threads == 1 else refusal)
    held, leave = threading.Event(), threading.Event()

    def hold():
        with lock.hold():
            held.set()
            leave.wait(30)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(30)
    assert in_a_fork(call).startswith(refusal)  # nobody would release it
    leave.set()
    other.join()


@pytest.mark.parametrize("copied", [pickle.dumps, copy.deepcopy, copy.copy])
def test_an_engine_says_what_to_do_instead(words, copied):
    engine = SteeredEngine(tiny_peft(), words, SteeringConfig(-4.0))
    with pytest.raises(TypeError, match=r"from_pretrained.*share it"):
        copied(engine)
    assert len(engine.generate([[5, 17]], max_new_tokens=2)) == 1
