"""Guesses change how many steps a text takes, and nothing else."""

import random

import pytest
import torch
from peft import PrefixTuningConfig
from transformers import LogitsProcessor

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.generation.pace import Chance, Costs, best
from svd_engine.generation.prompt_lookup import PromptLookup
from svd_engine.model.cuda_graphs import GraphedRunner
from svd_engine.ops import cpu
from tests.model.test_cuda_graphs import rerun
from tests.tiny import PROMPTS, tiny_base, tiny_peft

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="no native kernels")
STEERING = SteeringConfig(-4.0)
DTYPES = [torch.float32, torch.bfloat16]
LOOP = [9, 4, 31, 77, 9, 4, 31, 77, 9, 4]


@pytest.fixture
def costless(monkeypatch):
    """Try every guess, whatever a step of this machine costs."""
    monkeypatch.setattr(Costs, "of", lambda self, rows, new: 1.0)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def models(dtype):
    return {
        "model": tiny_peft("llama").to(dtype),
        "other": tiny_base("llama").to(dtype),
        "unlike": tiny_base("llama", seed=5).to(dtype),
        "prefix": tiny_peft(
            "mistral", PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
        ).to(dtype),
    }


@pytest.fixture(scope="module")
def engines(models, words):
    model = models["model"]
    return {
        "lora": SteeredEngine(model, words, STEERING),
        "two passes": SteeredEngine(model, words, STEERING, pairing="sequential"),
        "prefix": SteeredEngine(models["prefix"], words, STEERING),
        "checkpoints": SteeredEngine.from_checkpoints(
            models["other"], models["unlike"], words, steering=SteeringConfig(0.5)
        ),
        "one": SteeredEngine.from_model(models["other"], words, steering=STEERING),
    }


def asked(rng, engine, form):
    """Options of a call that differs from others in much."""
    prompts = [rng.choices(range(3, 40), k=rng.randint(1, 9)) for _ in range(rng.randint(1, 3))]
    prompts[0] = prompts[0] * 3
    options = dict(prompts=prompts, max_new_tokens=rng.choice([1, 7, 16]), eos_token_id=[])
    if form == "one":
        options["contrast"] = [[5, 6]]
    elif rng.random() < 0.2:
        options["model"] = rng.choice(["adapted", "base"])
    if rng.random() < 0.6:
        options |= dict(temperature=rng.choice([0.05, 0.4, 1.0]), seed=rng.randint(0, 99))
        options |= rng.choice([{}, dict(top_k=9), dict(top_p=0.8), dict(min_p=0.1)])
        options |= rng.choice([{}, {}, dict(typical_p=0.9), dict(num_return_sequences=2)])
    options |= rng.choice(
        [
            {}, {}, dict(eos_token_id=list(range(0, 200, 7))), dict(top_logprobs=3),
            dict(stop_strings=[f"w{i:03}" for i in range(0, 200, 9)]),
            dict(repetition_penalty=1.2), dict(no_repeat_ngram_size=2), dict(batch_size=2),
            dict(min_new_tokens=1, eos_token_id=list(range(0, 200, 3))),
            dict(presence_penalty=0.5, logit_bias={7: 3.0}),
            dict(prefix_allowed_tokens_fn=lambda _, ids: range(int(ids[-1]) % 3, 200, 3)),
        ]
    )  # fmt: skip
    return options


@pytest.mark.usefixtures("costless")
@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("form", ["lora", "two passes", "prefix", "checkpoints", "one"])
def test_completions_are_the_same_to_the_bit(engines, models, form, part):
    """Tokens, log-probabilities and texts of 200 mixed calls over forms and dtypes."""
    rng, engine = random.Random(f"{form} {part}"), engines[form]
    sources = ["prompt", 3, models["other"], ["prompt", models["unlike"]], [models["other"], 2]]
    for _ in range(4):
        options = asked(rng, engine, form)
        want = engine.generate(**options)
        assert engine.generate(**options, speculate=rng.choice(sources)) == want, options


@pytest.mark.usefixtures("costless")
@pytest.mark.parametrize("temperature", [0.0, 0.05])
def test_a_text_that_repeats_takes_fewer_steps(engines, monkeypatch, temperature):
    engine = engines["lora"]
    ring = {9: 4, 4: 31, 31: 77, 77: 9}
    options = dict(prompts=[LOOP, LOOP[:7]], max_new_tokens=40, eos_token_id=[])
    options |= dict(
        temperature=temperature, prefix_allowed_tokens_fn=lambda _, ids: [ring[int(ids[-1])]]
    )
    want = engine.generate(**options)
    steps, step = [], engine.pair.step
    monkeypatch.setattr(engine.pair, "step", lambda x, *a: (steps.append(x.shape), step(x, *a))[1])
    assert engine.generate(**options, speculate="prompt") == want
    assert steps == [(2, 11), (2, 11), (2, 11), (2, 6)]


@pytest.mark.usefixtures("costless")
def test_an_assistant_that_is_the_model_is_right(engines, models, monkeypatch):
    """Sampled too: it draws with the same noise."""
    engine = engines["checkpoints"]
    options = dict(prompts=PROMPTS, max_new_tokens=23, eos_token_id=[], model="adapted")
    options |= dict(temperature=1.0, seed=5)
    want = engine.generate(**options)
    pair, steps = engine._single["adapted"], []
    step = pair.step
    monkeypatch.setattr(pair, "step", lambda x, *a: (steps.append(x.shape), step(x, *a))[1])
    assert engine.generate(**options, speculate=[models["other"], 10]) == want
    assert len(steps) == 2


@pytest.mark.usefixtures("costless")
@pytest.mark.parametrize("form", ["two passes", "checkpoints"])
def test_the_adapted_model_goes_ahead(engines, form, monkeypatch):
    rng, engine = random.Random(form), engines[form]
    for _ in range(8):
        options = asked(rng, engine, form) | dict(model=None)
        source = rng.choice(["adapted", ["adapted", 2], ["adapted", "prompt"]])
        assert engine.generate(**options, speculate=source) == engine.generate(**options), options
    options = dict(max_new_tokens=13, eos_token_id=[], steering=SteeringConfig(0.0, alpha=0.0))
    base = engine.pair.runners[1]
    for temperature in (0.0, 0.7):
        want = engine.generate(PROMPTS, temperature=temperature, **options)
        with monkeypatch.context() as patch:
            steps = calls_of(base, "step", patch)
            got = engine.generate(
                PROMPTS, temperature=temperature, speculate=["adapted", 3], **options
            )
        assert got == want
        assert [tuple(tokens.shape) for tokens in steps] == [(4, 4)] * 3  # after the prompt


def calls_of(of, name, monkeypatch):
    """The first argument of each call of a method from now on."""
    calls, method = [], getattr(of, name)
    monkeypatch.setattr(of, name, lambda *a: (calls.append(a[0]), method(*a))[1])
    return calls


@pytest.mark.usefixtures("costless")
def test_plain_transformers_writes_the_same():
    model = tiny_peft("llama")
    engine = SteeredEngine(model, steering=SteeringConfig(0.0))
    for prompt in [*PROMPTS, LOOP]:
        ids = torch.tensor([prompt])
        own = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
        )
        (got,) = engine.generate(prompt, max_new_tokens=24, speculate="prompt")
        assert got.token_ids == own[0, len(prompt) :].tolist()


@pytest.mark.usefixtures("costless")
def test_streams_have_the_same_events(engines):
    engine = engines["lora"]
    options = dict(max_new_tokens=20, temperature=0.05, batch_size=3)
    options |= dict(stop_strings=["w009 w00"])
    plain, guessed = (
        [list(e) for e in engine.stream([LOOP, *PROMPTS], speculate=s, **options)]
        for s in (None, "prompt")
    )
    for row in range(5):
        assert [e for e in plain if e[0] == row] == [e for e in guessed if e[0] == row]
    engine.stream(LOOP, max_new_tokens=9, speculate="prompt").close()


class Recorded(LogitsProcessor):
    def __init__(self):
        self.texts = []

    def __call__(self, input_ids, scores):
        self.texts += input_ids.tolist()
        scores[:, 9] += 3.0 * (len(self.texts) % 2)
        return scores


@pytest.mark.usefixtures("costless")
def test_a_processor_sees_texts_that_came_true_once_each(engines):
    texts = []
    for speculate in (None, "prompt"):
        processor = Recorded()
        engines["lora"].generate(
            LOOP, max_new_tokens=20, logits_processor=[processor], speculate=speculate
        )
        texts.append(processor.texts)
    assert texts[0] == texts[1]


@pytest.mark.usefixtures("costless")
@pytest.mark.parametrize("options", [{}, dict(temperature=0.05, num_return_sequences=3)])
def test_recorded_steps(monkeypatch, options):
    monkeypatch.setattr("svd_engine.model.cuda_graphs.SLOTS", 8)
    model = tiny_peft("mistral")
    engine, graphed = (SteeredEngine(model, steering=STEERING) for _ in range(2))
    decoder = graphed._decoders[graphed.pair] = GraphedRunner(graphed.pair, rerun)
    prompts = [LOOP, *PROMPTS]
    want = engine.generate(prompts, max_new_tokens=30, **options)
    assert graphed.generate(prompts, max_new_tokens=30, speculate=4, **options) == want
    assert {key[1] for key in decoder._recordings._steps} == {1, 5}


def test_memory_does_not_grow(engines):
    engine = engines["lora"]
    for _ in range(2):
        engine.generate([LOOP] * 3, max_new_tokens=9, speculate="prompt")
        allocations = engine.pair.runner.cache.allocations
    engine.generate([LOOP] * 3, max_new_tokens=9, speculate="prompt")
    assert engine.pair.runner.cache.allocations == allocations


@pytest.mark.parametrize(
    "speculate, message",
    [
        ("promt", "'promt'"), (True, "'bool'"), (0, "must be an integer from 1"), (1.5, "'float'"),
        ([], "'list'"), (tiny_base("llama").get_decoder(), "LlamaModel has no head"),
    ],
)  # fmt: skip
def test_what_no_guesses_come_from(engines, speculate, message):
    with pytest.raises(ValueError, match=message):
        engines["lora"].generate(LOOP, max_new_tokens=5, speculate=speculate)


def test_what_cannot_speculate(engines, words):
    for form, options in (("lora", {}), ("two passes", dict(model="adapted"))):
        with pytest.raises(ValueError, match="needs a pass of each"):
            engines[form].generate(LOOP, max_new_tokens=5, speculate="adapted", **options)
    with pytest.raises(ValueError, match="or an assistant model, not both"):
        both = ["adapted", tiny_base("llama")]
        engines["two passes"].generate(LOOP, max_new_tokens=5, speculate=both)
    with pytest.raises(ValueError, match="num_beams = 2 keeps several"):
        engines["lora"].generate(LOOP, max_new_tokens=5, num_beams=2, speculate="prompt")
    walked = SteeredEngine(tiny_peft("gpt2"), steering=STEERING)
    with pytest.raises(ValueError, match="they run module by module, because"):
        walked.generate(LOOP, max_new_tokens=5, speculate="prompt")
    with pytest.raises(ValueError, match="no adapter"):
        adapted = tiny_peft("llama").get_base_model()
        engines["lora"].generate(LOOP, max_new_tokens=5, speculate=adapted)
    short = tiny_base("llama")
    short.config.max_position_embeddings = 12
    with pytest.raises(ValueError, match="the assistant of speculate reads does not fit"):
        engines["lora"].generate(LOOP, max_new_tokens=5, speculate=short)
    short.config.vocab_size = 100
    with pytest.raises(ValueError, match="vocabulary of 211 tokens; it has 100"):
        engines["lora"].generate(LOOP, max_new_tokens=5, speculate=type(short)(short.config))


def test_a_look_up_takes_the_latest_of_the_longest():
    assert PromptLookup([1, 2, 3, 4, 5, 1, 2]).guess(3) == ([3, 4, 5], 2)
    assert PromptLookup([1, 2, 3, 9, 2, 3, 8, 1, 2, 3]).guess(2) == ([9, 2], 3)
    assert PromptLookup([1, 2, 3, 1, 2, 4, 1, 2]).guess(1) == ([4], 2)
    assert PromptLookup([7, 7, 7]).guess(4) == ([7, 7, 7, 7], 2)
    assert PromptLookup([1, 2, 1, 2, 1, 2]).guess(5) == ([1, 2, 1, 2, 1], 4)
    assert PromptLookup([1, 2, 3]).guess(5) == PromptLookup([]).guess(5) == ([], 0)


def test_guesses_are_tried_where_they_pay():
    costs, good, bad = Costs(), Chance(9, 1), Chance(1, 4)
    for new in (1, 2, 5) * 9:
        costs.add(1, new, 0.6 + 0.4 * new)
    assert best(costs, 1, [good.of], 4)[0] == 4
    assert best(costs, 1, [bad.of], 4)[0] == 0
    assert best(costs, 1, [lambda k: 0.0], 4) == (0, 1.0)
    for _ in range(9):
        good.add(0, is_wrong=True)
    assert best(costs, 1, [good.of], 4)[0] == 0
    fair = Chance(1, 2)
    assert best(costs, 1, [fair.of], 4)[0] == 0
    for _ in range(400):  # steps of one token, after which another is worth a look
        costs.add(1, 1, 1.0)
    assert best(costs, 1, [fair.of], 4)[0] > 0
