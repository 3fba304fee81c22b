"""Prompts that begin like a text that was read: the same completions, and less to read."""

import random

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.generation.limits import Limits
from svd_engine.model.cuda_graphs import GraphedRunner
from svd_engine.model.runner import ModelRunner
from tests.model.test_cuda_graphs import rerun
from tests.tiny import tiny_base, tiny_peft

STEERING = SteeringConfig(-4.0)
RNG = random.Random(0)
FIRST, OTHER = (RNG.choices(range(3, 200), k=n) for n in (70, 66))
QUESTION = RNG.choices(range(3, 200), k=5)
METHODS = {
    "lora": None,
    "prompt": PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}
OPTIONS = dict(max_new_tokens=6, eos_token_id=[])


@pytest.fixture(params=[*METHODS, "two passes", "checkpoints"])
def engine(request, executor):
    if request.param == "checkpoints":
        models = tiny_base("mistral"), tiny_base("mistral", seed=3)
        return SteeredEngine.from_checkpoints(*models, steering=SteeringConfig(0.5))
    model = tiny_peft("mistral", METHODS.get(request.param))
    pairing = "sequential" if request.param == "two passes" else "auto"
    return SteeredEngine(model, steering=STEERING, pairing=pairing)


@pytest.fixture
def lora():
    return SteeredEngine(tiny_peft("llama"), steering=STEERING)


def fresh(engine, prompts, **options):
    """Completions of an engine that remembers nothing; what it knew comes back."""
    size, engine.prefix_cache.max_bytes = engine.prefix_cache.max_bytes, 0
    found = engine.generate(prompts, **options)
    engine.prefix_cache.max_bytes = size
    return found


def assert_alike(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.token_ids == b.token_ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.parametrize("sampled", [{}, dict(temperature=0.7, seed=3)], ids=["greedy", "sampled"])
def test_a_second_turn_reads_what_is_new(engine, monkeypatch, sampled):
    (first,) = engine.generate(FIRST, **OPTIONS, **sampled)
    prompt = FIRST + first.token_ids + QUESTION
    read, extend = [], ModelRunner.extend
    monkeypatch.setattr(
        ModelRunner, "extend", lambda self, x, *a: (read.append(x.shape[1]), extend(self, x, *a))[1]
    )
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "prefill", None)
        (got,) = engine.generate(prompt, **OPTIONS, **sampled)
    assert read[0] == len(QUESTION) + 1  # and the last token of the answer
    assert engine.prefix_cache.hits == 1
    assert engine.prefix_cache.tokens == len(FIRST) + 5
    assert_alike([got], fresh(engine, prompt, **OPTIONS, **sampled))


@pytest.mark.parametrize("chunk", [4, 1000], ids=["chunks", "together"])
def test_submitted_prompts_go_on_from_texts_too(engine, monkeypatch, chunk):
    """From those of submit and of generate, beside each other, and generate from theirs."""
    engine.limits = Limits(rows=4, chunk=chunk)
    (first,) = engine.submit(FIRST, **OPTIONS).completions()
    (second,) = engine.submit(FIRST + first.token_ids, max_new_tokens=1).completions()
    engine.generate(OTHER, **OPTIONS)
    answered, hits = FIRST + first.token_ids, engine.prefix_cache.hits
    prompts = [
        answered + second.token_ids + QUESTION, FIRST[:68] + QUESTION * 3, OTHER + QUESTION, FIRST,
        answered,
    ]  # fmt: skip
    sampled = dict(OPTIONS, temperature=0.7, num_return_sequences=2)
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "prefill", None)
        streams = [engine.submit(prompt, **OPTIONS) for prompt in prompts]
        copies = engine.submit(OTHER + QUESTION, **sampled).completions()
        got = [stream.completions()[0] for stream in streams]
        again = engine.generate(prompts[0] + [9], **OPTIONS)
    assert engine.prefix_cache.hits == hits + len(prompts) + 2
    engine.close()
    for prompt, completion in zip(prompts, got, strict=True):
        assert_alike([completion], fresh(engine, prompt, **OPTIONS))
    assert_alike(copies, fresh(engine, OTHER + QUESTION, **sampled))
    assert_alike(again, fresh(engine, prompts[0] + [9], **OPTIONS))


def test_rows_that_part_elsewhere(engine):
    """Rows of one batch, each from its own place in its own text; also beams and sequences."""
    engine.generate([FIRST, OTHER], **OPTIONS)
    size = engine.prefix_cache.bytes
    prompts = [FIRST[:68] + QUESTION * 3, OTHER + QUESTION, FIRST + QUESTION[:1]]
    for more in ({}, dict(num_beams=2), dict(temperature=1.0, num_return_sequences=2)):
        got = engine.generate(prompts, **OPTIONS, **more)
        assert engine.prefix_cache.bytes > size
        want = [
            completion
            for i, prompt in enumerate(prompts)
            for completion in SteeredEngine.generate(
                engine, prompt, **OPTIONS, **more, seed=i * more.get("num_return_sequences", 1)
            )
        ]
        assert_alike(got, want)
    hits = engine.prefix_cache.hits
    engine.generate([FIRST, QUESTION], **OPTIONS)  # one of them is new
    assert engine.prefix_cache.hits == hits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_call_again_has_the_same_bits(dtype):
    engine = SteeredEngine(tiny_peft("llama").to(dtype), steering=STEERING)
    want = engine.generate([FIRST, OTHER], **OPTIONS)
    assert engine.generate([FIRST, OTHER], **OPTIONS) == want
    assert engine.prefix_cache.hits == 2


def test_guesses_and_recorded_steps(lora):
    decoder = lora._decoders[lora.pair] = GraphedRunner(lora.pair, rerun)
    (first,) = lora.generate(FIRST, **OPTIONS)
    prompts = [FIRST + first.token_ids + QUESTION, FIRST + QUESTION, FIRST]
    for options in (OPTIONS, OPTIONS | dict(speculate="prompt")):
        got = lora.generate(prompts, **options)
        assert_alike(got, fresh(lora, prompts, **OPTIONS))
        lora.generate(FIRST, **OPTIONS)
    assert lora.prefix_cache.hits > 3 and decoder.graphs


def test_other_models_and_contrasts_read_their_own(lora):
    lora.generate(FIRST, **OPTIONS)
    for model in ("adapted", "base"):
        lora.generate(FIRST, **OPTIONS, model=model)
    lora.generate(FIRST, **OPTIONS, contrast=OTHER)
    assert lora.prefix_cache.hits == 0
    lora.generate(FIRST, **OPTIONS, model="base")
    assert lora.prefix_cache.hits == 1


def test_a_beginning_of_less_than_half_is_read_anew(lora, monkeypatch):
    monkeypatch.setattr("svd_engine.generation.prefix_cache.LEAST", 8)
    lora.generate(FIRST[:20], **OPTIONS)
    lora.generate(FIRST[:20] + OTHER[:25], **OPTIONS)
    assert lora.prefix_cache.hits == 0
    lora.generate(FIRST[:20] + OTHER[:18], **OPTIONS)
    assert lora.prefix_cache.hits == 1


def test_texts_make_room_for_others(lora):
    cache = lora.prefix_cache
    lora.generate(FIRST, **OPTIONS)
    one = cache.bytes
    # Keys and values of two layers, two heads of 8 in float32, of both models.
    assert one == 2 * 2 * 2 * 2 * 8 * 4 * (len(FIRST) + 5)
    lora.generate(FIRST + lora.generate(FIRST, **OPTIONS)[0].token_ids, **OPTIONS)
    assert one < cache.bytes < 2 * one  # a text that goes on takes the place of its beginning
    cache.clear()
    cache.max_bytes = 2 * one
    for prompt in (FIRST, OTHER, FIRST, [*QUESTION, *FIRST], FIRST):
        lora.generate(prompt, **OPTIONS)
        assert 0 < cache.bytes <= 2 * one
    hits = cache.hits
    lora.generate(OTHER, **OPTIONS)  # the one that was not used for longest is gone
    assert cache.hits == hits
    assert str(cache).startswith(f"PrefixCache(hits={hits}, ")
    cache.max_bytes = one // 2
    assert cache.bytes == 0
    lora.generate(FIRST, **OPTIONS)
    assert cache.bytes == 0
    lora.generate(QUESTION, **OPTIONS)
    with pytest.raises(ValueError, match="max_bytes must be an integer from 0"):
        cache.max_bytes = -1


@pytest.mark.parametrize("chunk", [7, 500])
def test_prompts_are_read_in_chunks(engine, monkeypatch, chunk):
    prompts = [FIRST, OTHER[:9], OTHER]
    want = fresh(engine, prompts, **OPTIONS)
    widths, forward = [], ModelRunner._forward
    monkeypatch.setattr(
        ModelRunner, "_forward",
        lambda self, x, *a, **k: (widths.append(x.shape[1]), forward(self, x, *a, **k))[1],
    )  # fmt: skip
    assert_alike(fresh(engine, prompts, **OPTIONS, prefill_chunk=chunk), want)
    assert max(widths, default=0) <= chunk + 5  # virtual tokens
    engine.generate(prompts[:1], **OPTIONS)
    got = engine.generate([*FIRST, *QUESTION], **OPTIONS, prefill_chunk=chunk)
    assert_alike(got, fresh(engine, [*FIRST, *QUESTION], **OPTIONS))


def test_a_chunk_that_is_none(lora):
    with pytest.raises(ValueError, match="prefill_chunk must be an integer from 1"):
        lora.generate(FIRST, **OPTIONS, prefill_chunk=0)
