"""What people ask of a generation engine: parameters, processors, seeds, batches, limits."""

import inspect
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack, get_args, get_type_hints

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, NoRepeatNGramLogitsProcessor

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.generation.options import GenerateOptions, SamplingOptions
from svd_engine.generation.sampling_params import OFF, WITHOUT_EFFECT, SamplingParams
from svd_engine.kernels import reference
from tests.tiny import PROMPTS, tiny_peft


@pytest.fixture(scope="module")
def model():
    return tiny_peft()


@pytest.fixture
def engine(model, words, executor):
    return SteeredEngine(model, words, SteeringConfig(-4.0))


def tokens(completions):
    return [c.token_ids for c in completions]


def cache_bytes(engine):
    return sum(memory.nbytes for memory in engine.pair.runner.cache._memory.values())


# parameters


def test_generation_config_means_what_transformers_says():
    read = SamplingParams.from_arguments
    assert read() == SamplingParams() and read().temperature == 0
    assert read(GenerationConfig(temperature=0.7)).temperature == 0  # do_sample is False
    sampled = read(GenerationConfig(do_sample=True, min_p=0.1, eos_token_id=[2, 5]))
    assert (sampled.temperature, sampled.top_k, sampled.min_p) == (1.0, 50, 0.1)
    assert list(sampled.eos_token_id) == [2, 5]
    assert read(GenerationConfig(do_sample=True, top_k=0)).top_k == 0
    assert read(GenerationConfig(max_length=40, max_new_tokens=7)).limit(10) == 7
    assert read(GenerationConfig(max_length=40)).limit(10) == 30
    assert read().limit(10) == 128


def test_keywords_win():
    read, sampling = (
        SamplingParams.from_arguments,
        GenerationConfig(do_sample=True, temperature=0.7),
    )
    assert read(sampling).temperature == 0.7
    assert read(sampling, temperature=0).temperature == 0
    assert read(sampling, do_sample=False).temperature == 0
    assert read(sampling, top_k=3, temperature=None).top_k == 3
    assert read(GenerationConfig(temperature=0.7), do_sample=True).temperature == 0.7
    assert read(GenerationConfig(), temperature=0.4).temperature == 0.4
    assert read(GenerationConfig(max_new_tokens=9), max_length=30).limit(10) == 20
    assert read(do_sample=True).temperature == 1 and read(do_sample=True).top_k == 0
    assert read(temperature=0.3).temperature == 0.3


CONTRADICTIONS = {
    "do_sample=False contradicts temperature=0.5": dict(do_sample=False, temperature=0.5),
    "do_sample=True contradicts temperature=0": dict(do_sample=True, temperature=0),
    "max_new_tokens or max_length, not both": dict(max_new_tokens=3, max_length=9),
    "would all be the same": dict(num_return_sequences=2),
    "must be a transformers.GenerationConfig": dict(generation_config={"top_k": 3}),
    "max_length must be": dict(max_length=0),
    "max_new_tokens must be an integer": dict(max_new_tokens=2.5),
    "repetition_penalty must be > 0": dict(repetition_penalty=0.0),
    "length_penalty must be finite": dict(length_penalty=float("nan")),
    "num_beams must be": dict(num_beams=0),
    "max_length = 5 leaves no room": dict(max_length=5),
    "top_logprobs must be at most the vocabulary's 211": dict(top_logprobs=212),
    "got 3 for 4": dict(seed=[1, 2, 3]),
    "batch_size must be": dict(batch_size=0),
    "holds a int": dict(logits_processor=[3]),
    "stop_strings has 2 lists for 4": dict(stop_strings=[["a"], ["b"]]),
    "stop_strings must be texts": dict(stop_strings=["a", ""]),
    "is decoded un-steered": dict(model="base", steering=SteeringConfig(1.0)),
    "vocabulary of 7 tokens": dict(steering=SteeringConfig(1.0, vocab_size=7)),
    "no chat template for messages": dict(prompts=None, messages=[{"role": "user"}]),
    "prompts or messages, one of the two": dict(messages=[]),
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_bad_parameters_are_refused_before_any_work(engine, message, monkeypatch):
    monkeypatch.setattr(engine.pair, "prefill", lambda *_: pytest.fail("the model was run"))
    options = {"prompts": PROMPTS, "max_new_tokens": 4} | CONTRADICTIONS[message]
    if "max_length" in options and options.get("max_new_tokens") == 4:
        del options["max_new_tokens"]
    with pytest.raises(ValueError, match=message):
        engine.generate(**options)


def test_no_field_of_transformers_is_silently_ignored():
    own = set(vars(SamplingParams())) | {"do_sample"}
    for name in vars(GenerationConfig()):
        if name in own or name in WITHOUT_EFFECT or name.startswith("_"):
            continue
        config = GenerationConfig()
        setattr(config, name, 17)
        with pytest.raises(ValueError, match=f"{name}=17 is not supported"):
            SamplingParams.from_arguments(config)
        with pytest.raises(ValueError, match=f"{name}=17 is not supported"):
            SamplingParams.from_arguments(**{name: 17})
    with pytest.raises(TypeError, match="'topk'"):
        SamplingParams.from_arguments(topk=3)
    config = GenerationConfig(**OFF, pad_token_id=0, use_cache=True)
    assert SamplingParams.from_arguments(config) == SamplingParams.from_arguments(
        GenerationConfig()
    )


def test_typed_options_are_the_fields_of_sampling_params():
    typed, fields = get_type_hints(SamplingOptions), get_type_hints(SamplingParams)
    assert set(typed) == set(fields) | {"generation_config", "do_sample"}
    for name, field in fields.items():
        allowed = set(get_args(field) or [field]) | {type(None)}
        if name == "stop_strings":  # None also stands for a prompt without any
            allowed ^= {Sequence[Sequence[str]], Sequence[Sequence[str] | None]}
        assert set(get_args(typed[name])) == allowed, name


def test_generate_stream_and_astream_are_typed(engine):
    for call in (engine.generate, engine.stream, engine.astream):
        assert get_type_hints(call)["options"] == Unpack[GenerateOptions]
    own = set(get_type_hints(GenerateOptions)) - set(get_type_hints(SamplingOptions))
    keywords = inspect.signature(engine._request).parameters.values()
    assert own == {p.name for p in keywords if p.kind == p.KEYWORD_ONLY}
    with pytest.raises(TypeError, match="'is_streamed'"):
        engine.generate(PROMPTS, is_streamed=True)


# what transformers gives


@pytest.mark.parametrize("form", ["paired", "sequential"])
def test_penalty_and_processors_equal_transformers(model, form):
    engine = SteeredEngine(model, None, SteeringConfig(0.0, alpha=0.0), pairing=form)
    chain = LogitsProcessorList([NoRepeatNGramLogitsProcessor(1)])
    for options in (
        dict(repetition_penalty=1.7), dict(logits_processor=chain),
        dict(repetition_penalty=0.6, logits_processor=chain),
    ):  # fmt: skip
        got = engine.generate(PROMPTS, max_new_tokens=12, **options)
        assert tokens(got) != tokens(engine.generate(PROMPTS, max_new_tokens=12))
        for completion, prompt in zip(got, PROMPTS, strict=True):
            ids = torch.tensor([prompt])
            truth = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12,
                do_sample=False, eos_token_id=2, pad_token_id=0, **options,
            )  # fmt: skip
            assert completion.token_ids == truth[0, len(prompt) :].tolist()


def test_processors_work_on_steered_logits(model, engine):
    seen = []

    def even(ids, scores):
        seen.append((ids.tolist(), scores.clone()))
        scores[:, 1::2] = -torch.inf
        return scores

    engine.steering = SteeringConfig(-4.0, alpha=0.0)
    got = engine.generate(PROMPTS[0], max_new_tokens=3, logits_processor=[even])[0]
    assert all(token % 2 == 0 for token in got.token_ids)
    assert [ids for ids, _ in seen] == [[PROMPTS[0] + got.token_ids[:n]] for n in range(3)]
    with torch.no_grad():
        adapted = model(torch.tensor([PROMPTS[0]])).logits[:, -1]
        with model.disable_adapter():
            base = model(torch.tensor([PROMPTS[0]])).logits[:, -1]
    steered = reference.steer(adapted, base, -4.0, alpha=0.0)
    torch.testing.assert_close(seen[0][1], steered, atol=5e-5, rtol=1e-5)
    seen.clear()
    engine.generate([PROMPTS[1], [7]], max_new_tokens=1, logits_processor=[even])
    assert [len(ids) for ids, _ in seen] == [2]
    engine.generate(PROMPTS, max_new_tokens=1, logits_processor=[even])
    assert [ids for ids, _ in seen[1:]] == [[prompt] for prompt in PROMPTS]
    with pytest.raises(ValueError, match="removed every token"):
        engine.generate(
            PROMPTS[0], max_new_tokens=3, logits_processor=[lambda ids, scores: scores - torch.inf]
        )


# seeds, copies, batches


def test_seeds_and_sequences(engine):
    engine.steering = SteeringConfig(-2.0, alpha=0.01)
    options = dict(temperature=1.3, max_new_tokens=8)
    one = [
        engine.generate(prompt, seed=40 + i, **options)[0].token_ids
        for prompt in PROMPTS[:2]
        for i in range(6)
    ]
    three = engine.generate(PROMPTS[:2], seed=40, num_return_sequences=3, **options)
    assert tokens(three) == one[:3] + one[6 + 3 :]
    assert len({tuple(t) for t in tokens(three)}) == 6
    each = engine.generate(
        PROMPTS[:2], seed=torch.tensor([41, 40]), num_return_sequences=2, **options
    )
    assert tokens(each) == [*one[1:3], *one[6:8]]
    split = engine.generate(
        PROMPTS[:2], seed=[41, 40], num_return_sequences=2, batch_size=1, **options
    )
    assert tokens(split) == tokens(each)


@pytest.mark.parametrize("options", [{}, dict(temperature=1.2), dict(num_beams=2)])
def test_batches_do_not_matter(engine, options):
    prompts = [[5 + i] * (1 + i % 5) for i in range(23)]
    whole = engine.generate(prompts, max_new_tokens=5, **options)
    parts = engine.generate(prompts, max_new_tokens=5, batch_size=4, **options)
    assert tokens(parts) == tokens(whole)
    if not options:
        fresh = SteeredEngine(engine.model, steering=engine.steering)
        fresh.generate(prompts * 3, max_new_tokens=5, batch_size=4)
        assert cache_bytes(fresh) * 23 == cache_bytes(engine) * 4


@pytest.mark.slow
def test_two_hundred_requests_one_by_one_and_together(model, words):
    """Lengths, limits, seeds, stops and strengths at random, through one engine and its cache."""
    draw = random.Random(3)
    engine = SteeredEngine(model, words)
    fresh = SteeredEngine(model, words)
    requests = [
        (
            [draw.randrange(3, 211) for _ in range(draw.randint(1, 12))],
            dict(
                temperature=draw.choice([0.0, 0.9, 1.4]), max_new_tokens=draw.randint(0, 7),
                steering=SteeringConfig(draw.uniform(-5, 3), alpha=draw.choice([0.0, 0.1])),
                eos_token_id=[draw.randrange(211) for _ in range(draw.randint(0, 40))],
                stop_strings=[f"w{draw.randrange(22):02}" for _ in range(draw.randint(0, 3))],
                top_k=draw.choice([0, 20]), repetition_penalty=draw.choice([1.0, 1.0, 1.2]),
            ),
            draw.randrange(1000),
        )
        for _ in range(200)
    ]  # fmt: skip
    others = [draw.randrange(3, 211) for _ in range(30)]
    sizes = []
    for prompt, options, seed in requests + requests[:20]:
        batch = [prompt, others[: draw.randint(1, 9)], others[18:], others[: draw.randint(1, 9)]]
        draw.shuffle(batch)
        at = batch.index(prompt)
        together = engine.generate(batch, seed=[seed] * 4, **options)
        alone = fresh.generate(prompt, seed=seed, **options)[0]
        got = together[at]
        assert (got.token_ids, got.text) == (alone.token_ids, alone.text)
        assert (got.finish_reason, got.stop_reason) == (alone.finish_reason, alone.stop_reason)
        sizes.append(cache_bytes(engine))
    largest = SteeredEngine(model, words, SteeringConfig(1.0))
    largest.generate([[5] * 12] * 4, max_new_tokens=7)
    assert sizes[-1] == cache_bytes(largest) and sizes == sorted(sizes)


# limits


def test_limits(engine):
    got = engine.generate(PROMPTS, max_length=12, eos_token_id=[])
    free = engine.generate(PROMPTS, max_new_tokens=12, eos_token_id=[])
    for a, b, prompt in zip(got, free, PROMPTS, strict=True):
        assert len(prompt) + len(a.token_ids) == 12 and a.finish_reason == "length"
        assert a.token_ids == b.token_ids[: len(a.token_ids)]
    at_once = engine.generate(PROMPTS, max_new_tokens=4, eos_token_id=list(range(211)))
    assert [c.completion_tokens for c in at_once] == [1] * 4
    assert [c.stop_reason for c in at_once] == [c.token_ids[0] for c in at_once]
    full = engine.generate([[5] * 127, [5]], max_new_tokens=1, eos_token_id=[])
    assert [c.completion_tokens for c in full] == [1, 1]


def test_a_row_at_the_end_of_its_context_leaves_the_batch():
    engine = SteeredEngine(tiny_peft("gpt2"), steering=SteeringConfig(-2.0))
    prompts = [[5, 6] * 60, [9]]
    got = engine.generate(prompts, max_length=128, eos_token_id=[])
    assert [c.completion_tokens for c in got] == [8, 127]


# what a completion tells


def test_top_logprobs(model, engine):
    got = engine.generate(PROMPTS, max_new_tokens=3, top_logprobs=4)
    ids = list(PROMPTS[0])
    for token, logprob, best in zip(
        got[0].token_ids, got[0].logprobs, got[0].top_logprobs, strict=True
    ):
        with torch.no_grad():
            adapted = model(torch.tensor([ids])).logits[:, -1]
            with model.disable_adapter():
                base = model(torch.tensor([ids])).logits[:, -1]
        truth = dict(adapted=adapted, base=base, steered=reference.steer(adapted, base, -4.0))
        assert set(best) == set(truth)
        for name, row in truth.items():
            top = row.log_softmax(-1)[0].topk(4)
            for (t, p), q, u in zip(best[name], top.values, top.indices, strict=True):
                assert p == pytest.approx(float(q), abs=1e-4) and (t == u or q == -torch.inf)
        assert best["steered"][0][0] == token
        assert best["steered"][0][1] == pytest.approx(logprob, abs=1e-6)
        ids.append(token)
    alone = engine.generate(PROMPTS[0], max_new_tokens=3, top_logprobs=4, model="adapted")[0]
    assert alone.top_logprobs[0] == {"adapted": alone.top_logprobs[0]["adapted"]}
    event = next(engine.stream(PROMPTS, max_new_tokens=3, top_logprobs=4))
    assert event.top_logprobs == got[0].top_logprobs[0]


def test_usage(engine):
    for got, prompt in zip(engine.generate(PROMPTS, max_new_tokens=6), PROMPTS, strict=True):
        assert got.prompt_tokens == len(prompt)
        assert got.completion_tokens == len(got.token_ids) == len(got.logprobs)
        assert 0 < got.seconds_to_first_token <= got.seconds


def test_messages(engine, words):
    words.chat_template = "{% for m in messages %}w010 {{ m.content }} {% endfor %}w011"
    try:
        one = [{"role": "user", "content": "w005 w006"}]
        two = [[{"role": "user", "content": "w007"}], one]
        got = engine.generate(messages=two, max_new_tokens=4)
        assert tokens(got) == tokens(
            engine.generate(["w010 w007 w011", "w010 w005 w006 w011"], max_new_tokens=4)
        )
        assert engine.generate(messages=one, max_new_tokens=4)[0].token_ids == got[1].token_ids
        with pytest.raises(ValueError, match=r"messages\[0\]\[0\]: content must be"):
            engine.generate(messages=[[{"role": "user"}]])
    finally:
        words.chat_template = None


def test_prompts_as_tensors(engine):
    plain = engine.generate([[5, 17], [40, 9]], max_new_tokens=3)
    assert engine.generate(torch.tensor([[5, 17], [40, 9]]), max_new_tokens=3) == plain
    alone = engine.generate(torch.tensor([40, 9]), max_new_tokens=3)
    assert tokens(alone) == tokens(plain[1:])


def test_the_page_on_choosing_tokens(engine, capsys):
    page = Path(__file__).parents[2] / "docs" / "engine.md"
    _, snippet, *_ = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    names = dict(engine=engine, prompts=PROMPTS[:2])
    exec(snippet, names)
    assert capsys.readouterr().out.startswith(names["greedy"].text)
    options = set(vars(SamplingParams())) | {"do_sample", "logits_processor", "steering", "model"}
    table = "".join(line for line in page.read_text().splitlines() if line.startswith("| `"))
    assert options <= set(re.findall(r"`(\w+)`", table))
