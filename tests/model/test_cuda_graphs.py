"""Steps replayed from recordings: the same tokens, few recordings, and a way on when one fails.

A recorder that runs the step again stands for CUDA graphs where there is no GPU.
"""

import contextlib
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PrefixTuningConfig

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.model import cuda_graphs
from svd_engine.model.cuda_graphs import GraphedRunner, bucket_rows, bucket_slots
from tests.tiny import PROMPTS, tiny_peft


def rerun(run, device, pool=None):
    """Runs the step at every replay and fills the same tensors, as a CUDA graph does."""
    outputs = []  # there from the first replay on

    def replay():
        fresh = run()
        if not outputs:
            outputs.extend(x.clone() for x in fresh)
        for kept, x in zip(outputs, fresh, strict=True):
            kept.copy_(x)

    return replay, outputs


def tokens(engine, prompts, max_new_tokens=17, **options):
    done = engine.generate(prompts, max_new_tokens=max_new_tokens, **options)
    return [completion.token_ids for completion in done]


def engines(config=None, record=rerun):
    model = tiny_peft("mistral", config)
    plain, graphed = (SteeredEngine(model, steering=SteeringConfig(-4.0)) for _ in range(2))
    graphed._decoders[graphed.pair] = GraphedRunner(graphed.pair, record)
    return plain, graphed


def recorded(engine):
    return engine._decoders[engine.pair].graphs


PREFIX = PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
OPTIONS = {
    "greedy": {},
    "sampled": dict(temperature=1.0, seed=7),
    "sequences": dict(temperature=1.0, num_return_sequences=3),
    "beams": dict(num_beams=3),
    "ends": dict(eos_token_id=list(range(0, 200, 9))),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("config", [None, PREFIX], ids=["lora", "prefix"])
def test_replayed_steps_give_the_same_completions(monkeypatch, config, options):
    monkeypatch.setattr(cuda_graphs, "SLOTS", 8)
    plain, graphed = engines(config)
    for prompts in (PROMPTS, PROMPTS[0], PROMPTS[1:], PROMPTS[:3] * 2):
        for new in (3, 17):
            asked = dict(max_new_tokens=new, **OPTIONS[options])
            assert tokens(graphed, prompts, **asked) == tokens(plain, prompts, **asked)
    assert recorded(graphed) > 1


def test_a_graph_serves_all_requests_of_its_bucket():
    _, graphed = engines()
    graphed.generate([[5, 6, 7]] * 5, max_new_tokens=4, eos_token_id=[])
    once = recorded(graphed)
    assert once == 1
    graphed.generate([[9] * 30] * 6, max_new_tokens=40, eos_token_id=[])
    graphed.steering = SteeringConfig(2.0, alpha=0.3)
    graphed.generate([[1, 2]] * 5, max_new_tokens=9, eos_token_id=[], temperature=0.7)
    assert recorded(graphed) == once


@pytest.mark.parametrize(("on_device", "count"), [(True, 2), (False, 8)])
def test_a_step_that_reads_lengths_on_the_device_has_a_graph_per_rows(on_device, count):
    class Pair:
        device, memory_key, lengths_on_device = torch.device("cpu"), 0, on_device

        def prefill(self, prompts, max_new_tokens=0, max_rows=0, contrast=None, chunk=None):
            return (torch.zeros(len(prompts), 4),) * 2

        def reorder(self, index):
            pass

        def step(self, tokens, kv_length=None):
            return (tokens[:, None].float(),) * 2

    graphed = GraphedRunner(Pair(), rerun)
    for rows, length, new in ((1, 9, 900), (1, 300, 3), (2, 5, 700), (2, 40, 2)):
        graphed.prefill([[1] * length] * rows, new)
        for token in range(new):
            tokens = torch.full((rows,), token)
            assert torch.equal(graphed.step(tokens)[0][:, 0], tokens.float())
    assert graphed.graphs == count


def test_warmup_leaves_nothing_to_record(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "SLOTS", 8)
    _, graphed = engines()
    graphed.warmup([1, 4], 30)
    before = recorded(graphed)
    for new in (1, 9, 20):
        graphed.generate(PROMPTS[:4], max_new_tokens=new, eos_token_id=[])
    assert recorded(graphed) == before


def test_moved_memory_is_recorded_anew():
    plain, graphed = engines()
    graphed.generate([5, 6], max_new_tokens=4, eos_token_id=[])
    graphed.generate([[5, 6]] * 8, max_new_tokens=4, eos_token_id=[])
    assert recorded(graphed) == 1  # the first one's memory is gone
    asked = dict(max_new_tokens=4, eos_token_id=[])
    assert tokens(graphed, [5, 6], **asked) == tokens(plain, [5, 6], **asked)


def test_a_capture_that_fails_is_told_once_and_decoding_goes_on(caplog):
    def fails(run, device, pool):
        raise RuntimeError("no capture today")

    plain, graphed = engines(record=fails)
    with caplog.at_level(logging.WARNING):
        for prompts in (PROMPTS, PROMPTS[0]):
            assert tokens(graphed, prompts) == tokens(plain, prompts)
    assert recorded(graphed) == 0
    said = "A step of %d rows goes on without a CUDA graph, because a capture failed: "
    said += "RuntimeError: no capture today"
    assert [r.message for r in caplog.records] == [said % rows for rows in (4, 4, 1, 1)]


def test_a_capture_is_tried_again_and_others_are_not_given_up():
    calls = []

    def fails_first(run, device, pool):
        calls.append(run)
        if len(calls) == 1:
            raise RuntimeError("out of memory, for once")
        return rerun(run, device)

    plain, graphed = engines(record=fails_first)
    for prompts in (PROMPTS, PROMPTS[0]):
        asked = dict(eos_token_id=[])
        assert tokens(graphed, prompts, **asked) == tokens(plain, prompts, **asked)
    assert len(calls) == 3 and recorded(graphed) == 2


class FakeGraph:
    """`torch.cuda.graph` of which a capture fails: it leaves its own stream current."""

    current, ended, inside, restored = "mine", [], 0, None

    def __init__(self, graph, pool, stream, **options):
        self.pool, self.stream = pool, stream

    def __enter__(self):
        assert FakeGraph.inside == 0, "two captures at a time"
        FakeGraph.inside, FakeGraph.current = 1, self.stream

    def __exit__(self, *raised):
        FakeGraph.inside = 0
        raise RuntimeError("capture_end failed")


@pytest.fixture
def fake_cuda(monkeypatch):
    class Generator:
        def clone_state(self):
            return "state"

        def graphsafe_set_state(self, state):
            FakeGraph.restored = state

    fakes = dict(
        device=lambda device: contextlib.nullcontext(), current_device=lambda: 0,
        current_stream=lambda device: FakeGraph.current, CUDAGraph=object,
        Stream=lambda index: f"stream {threading.get_ident()}", graph=FakeGraph,
        graph_pool_handle=lambda: "pool", default_generators=[Generator()],
        set_stream=lambda stream: setattr(FakeGraph, "current", stream),
    )  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(FakeGraph, "ended", [])
    monkeypatch.setattr(FakeGraph, "restored", None)
    end = lambda *place: FakeGraph.ended.append(place)  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)


def test_a_failed_capture_restores_stream_and_allocator(fake_cuda):
    with pytest.raises(RuntimeError, match="capture_end"):
        cuda_graphs.record(lambda: (), torch.device("cuda", 0), "ours")
    assert (FakeGraph.current, FakeGraph.restored) == ("mine", "state")
    assert FakeGraph.ended == [(0, "ours")]


def test_the_cause_of_a_failed_capture_is_not_hidden(fake_cuda, monkeypatch):
    """PyTorch 2.11 has left the pool by then, and refuses to leave it twice."""

    def left(index, pool):
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", left)
    with pytest.raises(RuntimeError, match="capture_end"):
        cuda_graphs.record(lambda: (), torch.device("cuda", 0), "ours")
    assert (FakeGraph.current, FakeGraph.restored) == ("mine", "state")


def test_graphs_share_a_pool_until_memory_has_moved(monkeypatch):
    """The allocator gives up a pool with its last graph; a capture into it would fail."""
    pools = []

    def record(run, device, pool):
        pools.append(pool)
        return rerun(run, device)

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(cuda_graphs, "SLOTS", 8)
    _, graphed = engines(record=record)
    decoder = graphed._decoders[graphed.pair]
    decoder._recordings._device = torch.device("cuda")
    for prompt, steps in (([5, 6], 9), ([5] * 40, 2)):
        decoder.prefill([prompt], 12)
        for _ in range(steps):
            decoder.step(torch.tensor([7]))
    assert len(pools) == 3 and pools[0] is pools[1] is not pools[2]


def test_captures_wait_for_each_other(fake_cuda):
    def capture():
        with contextlib.suppress(RuntimeError):
            cuda_graphs.record(lambda: time.sleep(0.02), torch.device("cuda", 0))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(capture) for _ in range(4)]:
            done.result()
    assert FakeGraph.current == "mine"


def test_work_on_another_stream_waits(monkeypatch):
    class Stream:
        def __init__(self):
            self.waits = []

        def wait_event(self, event):
            self.waits.append(event)

    class Event:
        def record(self, stream):
            self.stream = stream

    one, other = Stream(), Stream()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    order = cuda_graphs.Order(torch.device("cuda"))
    for current in (one, one, other, one):  # noqa: B007
        order.begin()
        order.end()
    assert len(other.waits) == 1 and len(one.waits) == 1
    assert other.waits[0].stream is one


def test_buckets():
    assert [bucket_rows(n) for n in (1, 3, 5, 64, 65)] == [1, 3, 6, 64, 65]
    assert [bucket_slots(n) for n in (1, 256, 257, 513, 1024, 1025)] == [
        256, 256, 512, 1024, 1024, 2048
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", [None, PREFIX], ids=["lora", "prefix"])
def test_cuda_graphs(config):
    model = tiny_peft("mistral", config).to("cuda")
    plain = SteeredEngine(model, steering=SteeringConfig(-4.0), cuda_graphs=False)
    graphed = SteeredEngine(model, steering=SteeringConfig(-4.0))
    for options in OPTIONS.values():
        assert tokens(graphed, PROMPTS, **options) == tokens(plain, PROMPTS, **options)
    assert recorded(graphed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_failed_cuda_capture_leaves_the_device_usable():
    def reads_the_device():
        return (torch.ones(1, device="cuda").sum().item(),)

    with pytest.raises(RuntimeError):
        cuda_graphs.record(reads_the_device, torch.device("cuda", 0))
    assert torch.randn(3, device="cuda").isfinite().all()
