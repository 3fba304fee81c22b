"""Beam search against transformers' own, on the adapted model and on a plain two-pass one."""

import itertools

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor, TemperatureLogitsWarper
from transformers.modeling_outputs import CausalLMOutput

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.kernels import reference
from tests.tiny import PROMPTS, tiny_peft

ENDS = list(range(2, 60, 3))  # so that beams of a random model end, at different times


@pytest.fixture(scope="module")
def model():
    return tiny_peft()


@pytest.fixture
def engine(model, words, executor):
    return SteeredEngine(model, words, SteeringConfig(0.0, alpha=0.0))


@pytest.fixture(scope="module")
def two_pass():
    """transformers on a model whose logits are the steered ones of two plain passes, no cache."""
    model = tiny_peft()
    inner = model.get_base_model()
    plain = inner.forward
    steering = dict(strength=0.0, alpha=0.0)

    def forward(input_ids, attention_mask=None, **_):
        adapted = plain(input_ids, attention_mask, use_cache=False).logits
        with model.disable_adapter():
            base = plain(input_ids, attention_mask, use_cache=False).logits
        steered = reference.steer(adapted.flatten(0, 1), base.flatten(0, 1), **steering)
        return CausalLMOutput(logits=steered.view_as(adapted))

    inner.forward = forward

    def generate(prompt, strength, alpha, **options):
        steering.update(strength=strength, alpha=alpha)
        return transformers_beams(inner, prompt, use_cache=False, **options)

    return generate


def transformers_beams(model, prompt, **options):
    """(tokens, score) of each sequence, without what pads it."""
    ids = torch.tensor([prompt])
    ends = options.pop("eos_token_id", ENDS)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=ends,
        pad_token_id=0, output_scores=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    sequences = []
    for row, score in zip(out.sequences, out.sequences_scores, strict=True):
        tokens = row[len(prompt) :].tolist()
        first = next((i for i, t in enumerate(tokens) if t in ends), len(tokens) - 1)
        sequences.append((tokens[: first + 1], float(score)))
    return sequences


def check(completions, sequences):
    assert [c.token_ids for c in completions] == [tokens for tokens, _ in sequences]
    for completion, (_, score) in zip(completions, sequences, strict=True):
        assert completion.score == pytest.approx(score, rel=1e-5, abs=1e-4)
        assert len(completion.logprobs) == len(completion.token_ids)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -1.5, 2.0])
def test_equals_transformers(model, engine, early_stopping, length_penalty):
    options = dict(
        num_beams=4, max_new_tokens=12, early_stopping=early_stopping,
        length_penalty=length_penalty, num_return_sequences=3,
    )  # fmt: skip
    together = engine.generate(PROMPTS, eos_token_id=ENDS, **options)
    for i, prompt in enumerate(PROMPTS):
        check(together[3 * i : 3 * i + 3], transformers_beams(model, prompt, **options))
    if length_penalty < 2:  # which favours the longest
        assert len({len(c.token_ids) for c in together}) > 1


@pytest.mark.parametrize("strength", [-4.0, 3.0])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_steered_equals_two_pass(engine, two_pass, strength, early_stopping):
    engine.steering = SteeringConfig(strength, alpha=0.0)
    options = dict(
        num_beams=4, max_new_tokens=8, early_stopping=early_stopping, num_return_sequences=4
    )
    together = engine.generate(PROMPTS, eos_token_id=ENDS, **options)
    for i, prompt in enumerate(PROMPTS):
        check(together[4 * i : 4 * i + 4], two_pass(prompt, strength, 0.0, **options))


def test_off_the_support_no_beam_goes_on(engine, two_pass):
    engine.steering = SteeringConfig(-4.0, alpha=0.3)
    options = dict(num_beams=4, max_new_tokens=6, early_stopping="never", length_penalty=0.0)
    for prompt in PROMPTS:
        got = engine.generate(prompt, eos_token_id=ENDS, num_return_sequences=4, **options)
        truth = two_pass(prompt, -4.0, 0.3, **options)
        check(got[:1], truth)
        assert all(c.score > -1e3 for c in got)
    engine.steering = SteeringConfig(-4.0, alpha=1.0)  # one token per step, so one path
    got = engine.generate(PROMPTS[0], num_return_sequences=2, **options)
    assert got[0] == got[1] and got[0].score == 0.0
    assert got[0].token_ids == engine.generate(PROMPTS[0], max_new_tokens=6)[0].token_ids


def test_wide_beams_find_the_best_of_all(engine):
    """As many beams as there are paths: the exhaustive search."""
    engine.steering = SteeringConfig(-2.0, alpha=0.0)
    best, other = engine.generate(
        PROMPTS[0], num_beams=211, max_new_tokens=2, eos_token_id=[], num_return_sequences=2
    )
    first = engine.score(PROMPTS[0], [[t] for t in range(211)])
    paths = [[a, b] for a in sorted(range(211), key=lambda t: -first[t])[:6] for b in range(211)]
    scores = engine.score(PROMPTS[0], paths)
    top = sorted(zip(scores, paths, strict=True), reverse=True)[:2]
    for got, (score, path) in zip((best, other), top, strict=True):
        assert got.token_ids == path and abs(sum(got.logprobs) - score) < 1e-4


@pytest.mark.parametrize("form", ["paired", "sequential"])
def test_processors_see_log_probabilities(model, form):
    engine = SteeredEngine(model, None, SteeringConfig(0.0, alpha=0.0), pairing=form)
    options = dict(num_beams=3, max_new_tokens=10, num_return_sequences=2)
    for penalty, custom in itertools.product((1.0, 1.6), (False, True)):
        chain = [NoRepeatNGramLogitsProcessor(1), TemperatureLogitsWarper(1.7)] if custom else []
        got = engine.generate(
            PROMPTS, eos_token_id=ENDS, repetition_penalty=penalty, logits_processor=chain,
            **options,
        )  # fmt: skip
        for i, prompt in enumerate(PROMPTS):
            truth = transformers_beams(
                model, prompt, repetition_penalty=penalty, logits_processor=chain, **options
            )
            check(got[2 * i : 2 * i + 2], truth)


def test_stop_strings_end_beams(engine):
    free = engine.generate(PROMPTS, num_beams=3, max_new_tokens=8, eos_token_id=[])
    stop = free[0].text.split()[3]
    options = dict(num_beams=3, max_new_tokens=8, eos_token_id=[], stop_strings=f" {stop}")
    for got in engine.generate(PROMPTS, **options):
        assert stop not in got.text
        assert (got.stop_reason == f" {stop}") == (got.finish_reason == "stop")
        assert got.text == engine.tokenizer.decode(got.token_ids).split(f" {stop}")[0]
    alone = [engine.generate(prompt, **options)[0].token_ids for prompt in PROMPTS]
    assert alone == [c.token_ids for c in engine.generate(PROMPTS, **options)]


def test_nothing_to_do_and_refusals(engine):
    assert engine.generate([], num_beams=2) == []
    empty = engine.generate(PROMPTS[0], num_beams=2, num_return_sequences=2, max_new_tokens=0)
    assert [c.token_ids for c in empty] == [[], []]
    for message, options in {
        "num_return_sequences = 3 must be at most num_beams = 2": dict(num_return_sequences=3),
        "without sampling": dict(temperature=1.0),
        "top_logprobs is not kept": dict(top_logprobs=2),
        "early_stopping must be": dict(early_stopping="always"),
    }.items():
        with pytest.raises(ValueError, match=message):
            engine.generate(PROMPTS, num_beams=2, **options)
    with pytest.raises(ValueError, match="beams cannot be streamed"):
        engine.stream(PROMPTS, num_beams=2, max_new_tokens=8)
