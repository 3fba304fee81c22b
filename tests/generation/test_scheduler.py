"""Requests that join and leave a running batch get what they would get alone."""

import asyncio
import gc
import random
import threading
import weakref

import pytest
import torch
from peft import PrefixTuningConfig
from transformers import LogitsProcessor

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.generation import scheduler
from svd_engine.generation.limits import Limits
from svd_engine.generation.scheduler import BusyError, ClosedError
from svd_engine.model.continuous import ContinuousBatch
from svd_engine.model.cuda_graphs import Recordings
from tests.tiny import PROMPTS, assert_same_tokens, tiny_base, tiny_peft, two_pass

LONG = [(7 * i) % 190 + 5 for i in range(60)]


@pytest.fixture(scope="module")
def model():
    return tiny_peft()


@pytest.fixture
def engine(model, words, executor):
    engine = SteeredEngine(model, words, SteeringConfig(-4.0))
    engine.limits = Limits(rows=4, chunk=8)
    yield engine
    engine.close()


def variety():
    """Requests whose options differ in every way in which rows of one batch can."""
    shift = SteeringConfig(-3.0, alpha=0.02)
    return [
        dict(prompts=PROMPTS[0], max_new_tokens=12),
        dict(prompts=LONG, max_new_tokens=9),
        dict(prompts=PROMPTS[1], max_new_tokens=15, temperature=0.9, seed=3),
        dict(prompts=PROMPTS[2], max_new_tokens=7, steering=shift),
        dict(prompts=PROMPTS, max_new_tokens=6, temperature=1.2, top_p=0.9, seed=[4, 5, 6, 7]),
        dict(prompts=PROMPTS[3], max_new_tokens=10, steering=SteeringConfig(2.0)),
        dict(prompts=PROMPTS[3], max_new_tokens=10, model="adapted", temperature=0.7, top_k=9),
        dict(prompts=PROMPTS[0], max_new_tokens=10, model="base", min_p=0.05, temperature=0.7),
        dict(prompts=PROMPTS[0], max_new_tokens=8, repetition_penalty=1.4),
        dict(prompts=PROMPTS[2], max_new_tokens=8, temperature=1.0, num_return_sequences=3),
        dict(prompts=PROMPTS[2], max_new_tokens=8, top_logprobs=3),
        dict(prompts=LONG, max_new_tokens=1, stop_strings="w0"),
        dict(prompts=PROMPTS[1], max_new_tokens=20, stop_strings="w1"),
        dict(prompts=PROMPTS[1], max_new_tokens=0),
        dict(prompts=PROMPTS, max_new_tokens=8, presence_penalty=0.6, frequency_penalty=0.3),
        dict(prompts=PROMPTS[0], max_new_tokens=9, logit_bias={7: 2.5}, no_repeat_ngram_size=2),
        dict(prompts=LONG, max_new_tokens=9, min_new_tokens=5, suppress_tokens=[44]),
        dict(prompts=PROMPTS[2], max_new_tokens=9, typical_p=0.8, temperature=0.9, top_k=20),
        dict(prompts=PROMPTS[2], max_new_tokens=9, epsilon_cutoff=0.01, temperature=0.9, seed=2),
        dict(prompts=PROMPTS[3], max_new_tokens=9, max_time=1000.0),
    ]


def same(got, want):
    """Equal but for the last bits of log-probabilities."""
    for a, b in zip(got, want, strict=True):
        assert (a.model, a.token_ids, a.text) == (b.model, b.token_ids, b.text)
        assert (a.finish_reason, a.stop_reason) == (b.finish_reason, b.stop_reason)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        for one, other in zip(a.top_logprobs, b.top_logprobs, strict=True):
            assert {k: [t for t, _ in v] for k, v in one.items()} == {
                k: [t for t, _ in v] for k, v in other.items()
            }


def recorded(pair, keys):
    """Returns a batch whose steps are recorded; what a graph holds fast must not have moved."""

    def where():
        return [
            (r.positions.data_ptr(), r.cache.first_row, [x[0].data_ptr() for x in memory(r)])
            for r in batch._pair.runners
        ]

    def memory(runner):
        return [runner.cache._layers[i] for i in sorted(runner.cache._layers)]

    def record(run, device, pool):
        there, outputs = where(), tuple(x.clone() for x in run())

        def replay():
            assert where() == there
            for kept, x in zip(outputs, run(), strict=True):
                kept.copy_(x)

        for places in batch._places:  # the recording itself has taken a step
            places.runner.positions -= 1
        return replay, outputs

    class Counted(Recordings):
        def step(self, key, *arguments):
            keys.append(key)
            return super().step(key, *arguments)

    batch = ContinuousBatch(pair, Counted(pair.device, record))
    return batch


def test_recorded_steps_serve_requests_that_come_and_go(engine, monkeypatch):
    keys = []
    monkeypatch.setattr(scheduler, "ContinuousBatch", lambda pair: recorded(pair, keys))
    engine.limits = Limits(rows=7, chunk=8)
    requests = variety()
    random.Random(1).shuffle(requests)
    streams = [engine.submit(**request) for request in requests]
    together = [stream.completions() for stream in streams]
    for request, got in zip(requests, together, strict=True):
        same(got, engine.generate(**request))
    assert {rows for rows, *_ in keys} >= {4, 6, 7}  # those of 5 are padded, 8 is no room for
    batch = engine.scheduler._batch
    assert batch._recordings.failures == 0 and batch._recordings.graphs <= 6


def test_requests_of_every_kind_beside_each_other(engine):
    requests = variety()
    random.Random(0).shuffle(requests)
    streams = [engine.submit(**request) for request in requests]
    together = [stream.completions() for stream in streams]
    for request, got in zip(requests, together, strict=True):
        same(got, engine.generate(**request))


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "gpt2"])
def test_they_equal_plain_peft(architecture, executor):
    model = tiny_peft(architecture)
    engine = SteeredEngine(model, steering=SteeringConfig(-4.0))
    engine.limits = Limits(rows=3, chunk=8)
    streams = [engine.submit(p, max_new_tokens=10) for p in (*PROMPTS, LONG)]
    for prompt, stream in zip((*PROMPTS, LONG), streams, strict=True):
        truth = two_pass(model, prompt, 10, -4.0)
        assert_same_tokens(stream.completions()[0].token_ids, truth, tie=1e-3)
    engine.close()


@pytest.mark.parametrize("pairing", ["sequential", "auto"])
def test_two_passes_and_a_prefix(pairing):
    config = PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    model = tiny_peft(config=config if pairing == "auto" else None)
    engine = SteeredEngine(model, steering=SteeringConfig(-4.0), pairing=pairing)
    engine.limits = Limits(rows=2, chunk=8)
    streams = [engine.submit(p, max_new_tokens=8) for p in (*PROMPTS, LONG)]
    for prompt, stream in zip((*PROMPTS, LONG), streams, strict=True):
        same(stream.completions(), engine.generate(prompt, max_new_tokens=8))
    engine.close()


def test_two_prompts_for_one_model(executor):
    engine = SteeredEngine.from_model(tiny_base("llama"), steering=SteeringConfig(-1.5, alpha=0.0))
    engine.limits = Limits(rows=3, chunk=8)
    requests = [
        dict(prompts=PROMPTS, contrast=[3]),
        dict(prompts=PROMPTS[1], contrast=LONG),
        dict(prompts=LONG, contrast=PROMPTS[2]),
        dict(prompts=LONG, model="adapted"),
    ]
    streams = [engine.submit(**request, max_new_tokens=8) for request in requests]
    for request, stream in zip(requests, streams, strict=True):
        same(stream.completions(), engine.generate(**request, max_new_tokens=8))
    engine.close()


def test_the_time_of_a_request_is_its_own(engine):
    """It ends what runs and what waits of the request, and nothing of its neighbours."""
    engine.limits = Limits(rows=3)
    other = engine.submit(PROMPTS[0], max_new_tokens=60, eos_token_id=[])
    next(other)
    short = engine.submit(PROMPTS * 2, max_new_tokens=100, eos_token_id=[], max_time=1e-6)
    ended = short.completions()
    assert {x.finish_reason for x in ended} == {"time"}
    assert all(len(x.token_ids) <= 1 and x.seconds for x in ended)
    same(other.completions(), engine.generate(PROMPTS[0], max_new_tokens=60, eos_token_id=[]))


def test_a_long_prompt_stops_nobody(engine):
    """While its chunks are read, the one that runs gets a token after each."""
    runs = engine.submit(PROMPTS[0], max_new_tokens=40, eos_token_id=[])
    next(runs)
    order = []
    engine.scheduler._deliver = watch(engine.scheduler._deliver, order)
    reads = engine.submit(LONG, max_new_tokens=2, eos_token_id=[])
    same(reads.completions(), engine.generate(LONG, max_new_tokens=2, eos_token_id=[]))
    runs.completions()
    between = [stream for stream, _ in order[: order.index((reads, 1))]]
    assert between.count(runs) >= len(LONG) // 8


def watch(deliver, order):
    def wrapped(row, event):
        order.append((row.stream, len(row.sequence.token_ids)))
        deliver(row, event)

    return wrapped


def test_events_for_coroutines_and_leaving_early(engine):
    want = engine.generate(PROMPTS[0], max_new_tokens=30, eos_token_id=[])[0]

    async def read(stop):
        got = []
        with engine.submit(PROMPTS[0], max_new_tokens=30, eos_token_id=[]) as stream:
            async for event in stream:
                got.append(event.token_id)
                if len(got) == stop:
                    break
        return got

    async def all_at_once():
        return await asyncio.gather(*(read(stop) for stop in (30, 3, 30, 7, 1, 30)))

    for got, stop in zip(asyncio.run(all_at_once()), (30, 3, 30, 7, 1, 30), strict=True):
        assert got == want.token_ids[:stop]
    engine.submit(PROMPTS[1], max_new_tokens=1).completions()  # a round later
    assert engine.scheduler.running == engine.scheduler.waiting == 0


def test_many_short_requests_of_many_threads_of_which_some_leave(engine):
    want = [engine.generate(p, max_new_tokens=4, eos_token_id=[])[0].token_ids for p in PROMPTS]
    wrong = []

    def client(seed):
        choice = random.Random(seed)
        for _ in range(40):
            i = choice.randrange(4)
            with engine.submit(PROMPTS[i], max_new_tokens=4, eos_token_id=[]) as stream:
                got = [next(stream).token_id]
                if choice.random() < 0.1:
                    continue
                got += [event.token_id for event in stream]
            if got != want[i]:
                wrong.append((i, got))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_batch_makes_room_as_it_needs_it(model, words):
    engine = SteeredEngine(model, words, SteeringConfig(-4.0))
    engine.limits = Limits(rows=8, tokens=200, chunk=64)
    requests = [dict(prompts=p, max_new_tokens=n) for p in PROMPTS for n in (3, 20, 90)]
    streams = [engine.submit(**request) for request in requests]
    for request, stream in zip(requests, streams, strict=True):
        same(stream.completions(), engine.generate(**request))
    with pytest.raises(ValueError, match="200 tokens of the batch"):
        engine.submit([[5] * 90], max_new_tokens=30, num_return_sequences=2, temperature=1.0)
    with pytest.raises(ValueError, match="9 completions"):
        engine.submit(PROMPTS[0], max_new_tokens=2, num_return_sequences=9, temperature=1.0)
    engine.close()


@pytest.mark.parametrize("option", [{"speculate": "prompt"}, {"prefill_chunk": 16}])
def test_what_a_batch_of_its_own_does_is_refused(model, words, option):
    engine = SteeredEngine(model, words, SteeringConfig(-4.0))
    with pytest.raises(ValueError, match=f"{next(iter(option))} is for a batch of its own"):
        engine.submit(PROMPTS[0], max_new_tokens=2, **option)


def test_what_fails_in_one_request_fails_in_no_other(engine):
    class Breaks(LogitsProcessor):
        def __call__(self, ids, scores):
            if ids.shape[1] > len(PROMPTS[0]) + 2:
                raise ZeroDivisionError("broken")
            return scores

    good = engine.submit(PROMPTS[2], max_new_tokens=10)
    bad = engine.submit(PROMPTS[0], max_new_tokens=10, logits_processor=[Breaks()])
    with pytest.raises(ZeroDivisionError):
        bad.completions()
    same(good.completions(), engine.generate(PROMPTS[2], max_new_tokens=10))


def test_what_is_not_finite_does_not_reach_the_next_sequence_there(model, words, executor):
    engine = SteeredEngine(model, words, SteeringConfig(-4.0), probe=False)
    weight = model.get_base_model().get_input_embeddings().weight
    good = engine.submit(PROMPTS[0], max_new_tokens=30, eos_token_id=[])
    next(good)
    with torch.no_grad():
        before = weight[150].clone()
        weight.data[150] = float("nan")
    try:
        engine._models.adapted.state.check = lambda: None
        bad = engine.submit([9, 150, 9], max_new_tokens=5)
        with pytest.raises(ValueError, match="not finite"):
            bad.completions()
    finally:
        weight.data[150] = before
    after = engine.submit([9, 15], max_new_tokens=20, eos_token_id=[])
    same(after.completions(), engine.generate([9, 15], max_new_tokens=20, eos_token_id=[]))
    same(good.completions(), engine.generate(PROMPTS[0], max_new_tokens=30, eos_token_id=[]))
    engine.close()


def test_a_failed_round_ends_what_runs_and_nothing_else(engine):
    first = engine.submit(PROMPTS[0], max_new_tokens=100, eos_token_id=[])
    next(first)
    step = engine.scheduler._batch.step

    def fail(tokens):
        raise MemoryError("no memory")

    engine.scheduler._batch.step = fail
    with pytest.raises(MemoryError):
        first.completions()
    assert engine.scheduler._batch.step is not step
    same(
        engine.submit(PROMPTS[2], max_new_tokens=9).completions(),
        engine.generate(PROMPTS[2], max_new_tokens=9),
    )


def test_too_many_wait(engine):
    engine.limits = Limits(rows=1, waiting=2)
    streams = [engine.submit(PROMPTS[0], max_new_tokens=60, eos_token_id=[])]
    next(streams[0])
    streams += [engine.submit(PROMPTS[0], max_new_tokens=2) for _ in range(2)]
    with pytest.raises(BusyError):
        engine.submit(PROMPTS[0], max_new_tokens=2)
    streams[0].cancel()
    assert all(stream.completions() for stream in streams[1:])


def test_closing_finishes_or_ends_what_is_there(model, words):
    engine = SteeredEngine(model, words, SteeringConfig(-4.0))
    engine.limits = Limits(rows=2)
    streams = [engine.submit(p, max_new_tokens=9) for p in PROMPTS]
    engine.close(finish=True)
    for prompt, stream in zip(PROMPTS, streams, strict=True):
        same(stream.completions(), engine.generate(prompt, max_new_tokens=9))
    with pytest.raises(ClosedError):
        engine.submit(PROMPTS[0], max_new_tokens=2)
    engine = SteeredEngine(model, words, SteeringConfig(-4.0))
    engine.limits = Limits(rows=2)
    streams = [engine.submit(p, max_new_tokens=100, eos_token_id=[]) for p in PROMPTS]
    engine.close()
    for stream in streams:
        with pytest.raises(ClosedError):
            stream.completions()


def test_an_engine_that_nobody_holds_goes_with_its_thread(model, words):
    engine = SteeredEngine(model, words, SteeringConfig(-4.0))
    stream = engine.submit(PROMPTS[0], max_new_tokens=9)
    thread, gone = engine.scheduler._thread, weakref.ref(engine)
    del engine
    assert len(stream.completions()) == 1
    del stream
    gc.collect()
    thread.join(10)
    assert gone() is None and not thread.is_alive()


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "4"])
def test_limits_are_counts(value):
    with pytest.raises(ValueError, match="chunk must be an integer"):
        Limits(chunk=value)
