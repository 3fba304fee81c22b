"""Memory after many requests of all kinds: what the first ones needed, and no more."""

import gc
import random

import pytest
import torch

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.ops import cpu
from tests.tiny import tiny_base, tiny_peft

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="no native kernels")
RNG = random.Random(0)
CHATS = [RNG.choices(range(3, 200), k=66) for _ in range(3)]
KEPT = 150_000  # bytes: four of these texts


@pytest.fixture(scope="module", params=["paired", "sequential"])
def engine(request):
    engine = SteeredEngine(tiny_peft(), steering=SteeringConfig(-4.0), pairing=request.param)
    engine.prefix_cache.max_bytes = KEPT
    return engine


@pytest.fixture(scope="module")
def assistant():
    return tiny_base("llama", seed=5)


def ask(engine, assistant, rng):
    """Make one request, of any kind that there is."""
    chat = rng.choice([[], *CHATS])
    prompts = [
        [*chat, *rng.choices(range(3, 40), k=rng.randint(1, 9)) * 2]
        for _ in range(rng.choice([1, 1, 2, 3, 5]))
    ]
    options = dict(max_new_tokens=rng.choice([1, 4, 9]), eos_token_id=[])
    kind = rng.choice(["generate", "generate", "stream", "left", "submit", "score", "beams"])
    if kind == "score":
        return engine.score(prompts[0], [[5, 6], [7]])
    if kind == "beams":
        return engine.generate(prompts, num_beams=2, **options)
    options |= rng.choice([{}, dict(temperature=0.7, seed=3), dict(top_logprobs=2)])
    if kind == "submit":
        return [*engine.submit(prompts, **options)]
    options |= rng.choice([{}, dict(prefill_chunk=16), dict(batch_size=2), dict(model="adapted")])
    options |= rng.choice([{}, dict(speculate="prompt"), dict(speculate=["prompt", assistant, 3])])
    if kind == "generate":
        return engine.generate(prompts, **options)
    events = engine.stream(prompts, **options)
    return next(events) if kind == "left" else [*events]


def held():
    """Python's objects, and the bytes of all tensors, each memory once."""
    gc.collect()
    objects = gc.get_objects()
    tensors = (x for x in objects if issubclass(type(x), torch.Tensor))
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return len(objects), sum(storages.values())


def test_many_requests_of_all_kinds_hold_no_more(engine, assistant):
    counts = []
    for _ in range(3):  # the first makes what is kept
        rng = random.Random(1)
        for _ in range(25):
            ask(engine, assistant, rng)
        counts.append(held())
    assert engine.prefix_cache.hits > 0 and 0 < engine.prefix_cache.bytes <= KEPT
    (objects, size), (objects_then, size_then) = counts[1:]
    assert objects_then <= objects + 20 and size_then <= size
