"""One call at a time: streams left halfway, threads, coroutines."""

import asyncio
import threading

import pytest

from svd_engine import SteeredEngine, SteeringConfig
from tests.tiny import PROMPTS, tiny_peft

OPTIONS = dict(max_new_tokens=9, eos_token_id=[])


@pytest.fixture
def engine(words, executor):
    return SteeredEngine(tiny_peft(), words, SteeringConfig(-4.0))


def tokens(events, rows=4):
    got = [[] for _ in range(rows)]
    for event in events:
        got[event.row].append(event.token_id)
    return got


def answers(engine, prompts=PROMPTS):
    return [c.token_ids for c in engine.generate(prompts, **OPTIONS)]


def test_an_open_stream_refuses_its_own_thread(engine):
    whole = answers(engine)
    stream = engine.stream(PROMPTS, **OPTIONS)
    unread = engine.stream(PROMPTS, **OPTIONS)  # holds nothing until it is read
    first = next(stream)
    for call in (
        lambda: answers(engine), lambda: next(unread), lambda: engine.score([5], [[6]]),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"close\(\) it first"):
            call()
    assert tokens([first, *stream]) == whole
    assert answers(engine) == whole


def test_closed_forgotten_and_failed_streams_free_the_engine(engine, monkeypatch):
    whole = answers(engine)
    stream = engine.stream(PROMPTS[2], **OPTIONS)
    next(stream)
    stream.close()
    assert answers(engine) == whole
    next(engine.stream(PROMPTS[2], **OPTIONS))
    assert answers(engine) == whole

    def interrupted(tokens):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.pair, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answers(engine)
        with pytest.raises(KeyboardInterrupt):
            list(engine.stream(PROMPTS, **OPTIONS))
    assert answers(engine) == whole


def test_threads_take_turns(engine):
    whole, got = answers(engine), {}

    def call(i):
        if i % 2:
            got[i] = answers(engine, [PROMPTS[i]])
        else:
            got[i] = tokens(engine.stream([PROMPTS[i]], **OPTIONS), 1)

    stream = engine.stream(PROMPTS, **OPTIONS)
    first = next(stream)
    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    threads[0].join(0.05)
    assert not got  # they wait for the open stream
    assert tokens([first, *stream]) == whole
    for thread in threads:
        thread.join(30)
    assert got == {i: [whole[i]] for i in range(4)}


def test_steering_may_change_while_a_stream_is_open(engine):
    whole = answers(engine)
    stream = engine.stream(PROMPTS, **OPTIONS)
    engine.steering = SteeringConfig(3.0)
    assert tokens(stream) == whole
    assert answers(engine) != whole


def test_async_streams_wait_for_each_other(engine):
    whole = answers(engine)

    async def read(prompts):
        return tokens([e async for e in engine.astream(prompts, **OPTIONS)], len(prompts))

    async def main():
        return await asyncio.gather(*(read([prompt]) for prompt in PROMPTS), read(PROMPTS))

    *each, together = asyncio.run(main())
    assert [row for rows in each for row in rows] == whole == together


def test_a_cancelled_async_stream_stops_decoding(engine, monkeypatch):
    whole, steps = answers(engine), []
    step = engine.pair.step
    monkeypatch.setattr(engine.pair, "step", lambda tokens: steps.append(1) or step(tokens))

    async def main():
        begun = asyncio.Event()

        async def read():
            async for _ in engine.astream(PROMPTS, max_new_tokens=100, eos_token_id=[]):
                begun.set()

        reading = asyncio.create_task(read())
        waiting = asyncio.create_task(read())
        await begun.wait()
        for task in (waiting, reading):
            task.cancel()
        for task in (waiting, reading):
            with pytest.raises(asyncio.CancelledError):
                await task
        count = len(steps)
        assert await asyncio.to_thread(answers, engine) == whole
        assert count < 50 and len(steps) <= count + 1 + 8

    asyncio.run(main())
    assert answers(engine) == whole


def test_an_async_stream_refuses_what_would_wait_for_ever(engine):
    async def main():
        stream = engine.astream(PROMPTS, **OPTIONS)
        await anext(stream)
        with pytest.raises(RuntimeError, match=r"close\(\) it first"):
            answers(engine)
        with pytest.raises(RuntimeError, match=r"close\(\) it first"):
            await anext(engine.astream(PROMPTS, **OPTIONS))
        await stream.aclose()

    asyncio.run(main())
    assert len(answers(engine)) == 4


def test_bad_arguments_raise_where_the_stream_is_made(engine):
    for make in (engine.stream, engine.astream):
        with pytest.raises(ValueError, match="temperature must be"):
            make([5], max_new_tokens=2, temperature=-1)
