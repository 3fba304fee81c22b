"""The engine against plain two-pass PEFT, token for token."""

import functools

import pytest
import torch

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.kernels import reference
from svd_engine.ops import dispatch
from tests.tiny import CONFIGS, PROMPTS, VOCAB, assert_same_tokens, tiny_peft, two_pass


@pytest.fixture(scope="module")
def model():
    return tiny_peft()


@pytest.fixture
def engine(model, words, executor):
    return SteeredEngine(model, words, SteeringConfig(-4.0))


@functools.cache
def truth(architecture, strength):
    return [two_pass(tiny_peft(architecture), prompt, 12, strength) for prompt in PROMPTS]


@pytest.mark.parametrize("strength", [-4.0, 0.0, 3.0])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_ragged_batch_equals_two_pass(architecture, strength, executor):
    model = tiny_peft(architecture)
    engine = SteeredEngine(model, steering=SteeringConfig(strength), pairing="paired")
    completions = engine.generate(PROMPTS, max_new_tokens=12)
    for got, want in zip(completions, truth(architecture, strength), strict=True):
        assert_same_tokens(got.token_ids, want, tie=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("steering", [SteeringConfig(0.0, alpha=0.0), SteeringConfig(0.0), None])
def test_strength_zero_is_the_adapted_models_own_greedy(architecture, steering):
    model = tiny_peft(architecture)
    engine = SteeredEngine(model, steering=steering)
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        own = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        got = engine.generate(prompt, max_new_tokens=12)[0].token_ids
        assert got == own[0, len(prompt) :].tolist()


def test_sequential_form_equals_paired(model, engine):
    other = SteeredEngine(model, steering=engine.steering, pairing="sequential")
    options = dict(max_new_tokens=20)
    for a, b in zip(
        engine.generate(PROMPTS, **options), other.generate(PROMPTS, **options), strict=True
    ):
        assert a.token_ids == b.token_ids


def test_one_model_alone(model, engine):
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad(), model.disable_adapter():
        base = int(model(ids).logits[0, -1].argmax())
    assert engine.generate(PROMPTS[0], model="base", max_new_tokens=1)[0].token_ids == [base]
    alone = engine.generate(PROMPTS[0], model="adapted", max_new_tokens=8)
    engine.steering = None
    assert engine.generate(PROMPTS[0], max_new_tokens=8)[0].token_ids == alone[0].token_ids
    with pytest.raises(ValueError, match=r"needs engine\.steering"):
        engine.generate(PROMPTS[0], model="steered", max_new_tokens=8)


@pytest.mark.parametrize("cuts", [{}, dict(top_k=20), dict(top_p=0.9), dict(min_p=0.05)])
def test_sampling_is_the_same_alone_and_in_a_batch(engine, cuts):
    engine.steering = SteeringConfig(-4.0, alpha=0.01)
    options = dict(max_new_tokens=10, temperature=1.3, **cuts)
    together = engine.generate(PROMPTS, seed=40, **options)
    assert together != engine.generate(PROMPTS, seed=50, **options)
    for i, prompt in enumerate(PROMPTS):
        assert engine.generate(prompt, seed=40 + i, **options)[0].token_ids == together[i].token_ids


def test_logprobs_are_those_of_the_steered_distribution(model, engine):
    got = engine.generate(PROMPTS[0], max_new_tokens=4)[0]
    ids = list(PROMPTS[0])
    for token, logprob in zip(got.token_ids, got.logprobs, strict=True):
        with torch.no_grad():
            adapted = model(torch.tensor([ids])).logits[:, -1]
            with model.disable_adapter():
                base = model(torch.tensor([ids])).logits[:, -1]
        truth = reference.score(adapted, base, -4.0, torch.tensor([token]))
        assert abs(float(truth) - logprob) < 1e-4
        ids.append(token)


def test_score_equals_two_pass(model, engine):
    continuations = [[9, 33, 2], [101, 7], [55]]
    engine.steering = SteeringConfig(-6.0)
    for got, continuation in zip(
        engine.score(PROMPTS[0], continuations), continuations, strict=True
    ):
        ids = torch.tensor([PROMPTS[0] + continuation])
        with torch.no_grad():
            adapted = model(ids).logits[0, len(PROMPTS[0]) - 1 : -1]
            with model.disable_adapter():
                base = model(ids).logits[0, len(PROMPTS[0]) - 1 : -1]
        truth = reference.score(adapted, base, -6.0, torch.tensor(continuation), penalty=0.0)
        assert abs(float(truth.sum()) - got) < 1e-4


def test_rows_end_one_by_one(engine):
    full = engine.generate(PROMPTS, max_new_tokens=12, eos_token_id=[])
    assert {c.finish_reason for c in full} == {"length"}
    ends = [full[0].token_ids[2], full[1].token_ids[5]]
    stopped = engine.generate(PROMPTS, max_new_tokens=12, eos_token_id=ends)
    for a, b in zip(stopped, full, strict=True):
        cut = next((i for i, t in enumerate(b.token_ids) if t in ends), None)
        assert a.token_ids == b.token_ids[: None if cut is None else cut + 1]
        assert a.finish_reason == ("length" if cut is None else "stop")


def test_stream_gives_what_generate_gives(engine):
    whole = engine.generate(PROMPTS, max_new_tokens=9)
    for row, completion in enumerate(whole):
        events = [e for e in engine.stream(PROMPTS, max_new_tokens=9) if e.row == row]
        assert [e.token_id for e in events] == completion.token_ids
        assert "".join(e.text for e in events) == completion.text
        assert events[-1].finish_reason == completion.finish_reason
    assert completion.text.startswith("w")


def test_a_stream_left_halfway_leaves_the_engine_usable(engine):
    whole = engine.generate(PROMPTS[0], max_new_tokens=9)
    next(engine.stream(PROMPTS[2], max_new_tokens=9))
    assert engine.generate(PROMPTS[0], max_new_tokens=9) == whole


def test_texts_and_nothing_to_do(engine):
    text, ids = (
        engine.generate(p, max_new_tokens=9)[0] for p in ("w005 w017 w040 w009 w033", PROMPTS[0])
    )
    assert text == ids
    assert engine.generate([]) == []
    empty = engine.generate(PROMPTS[0], max_new_tokens=0)[0]
    assert (empty.token_ids, empty.text, empty.finish_reason) == ([], "", "length")


def test_the_context_can_be_filled_to_the_last_token(engine):
    prompt = [5] * 120
    assert len(engine.generate(prompt, max_new_tokens=8, eos_token_id=[])[0].token_ids) == 8


BAD = {
    "does not fit: 121 tokens and max_new_tokens = 8 make 129; the model's context is 128": dict(
        prompts=[5] * 121, max_new_tokens=8
    ),
    r"prompts\[1\] is empty": dict(prompts=[[5], []], max_new_tokens=8),
    "is empty": dict(prompts=""),
    "token ids from 5 to 211": dict(prompts=[5, VOCAB]),
    "max_new_tokens must be": dict(prompts=[5], max_new_tokens=-1),
    "temperature must be": dict(prompts=[5], temperature=float("nan")),
    "model must be one of": dict(prompts=[5], model="both", max_new_tokens=8),
}


@pytest.mark.parametrize("message", BAD)
def test_refusals(engine, message):
    with pytest.raises(ValueError, match=message):
        engine.generate(**BAD[message])


def test_refusals_of_the_rest(model, engine):
    with pytest.raises(TypeError, match="topk"):
        engine.generate([5], topk=3)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        SteeredEngine(model).generate("w005")
    with pytest.raises(ValueError, match="a continuation has no tokens"):
        engine.score([5], [[]])
    with pytest.raises(ValueError, match="vocabulary of 999 tokens; the model has 211"):
        engine.steering = SteeringConfig(1.0, vocab_size=999)


def test_logits_that_are_not_finite_are_an_error(model, engine, monkeypatch):
    monkeypatch.setattr(
        engine.pair, "logits", lambda hidden: (torch.full((1, VOCAB), float("nan")),) * 2
    )
    with pytest.raises(ValueError, match="not finite"):
        engine.generate([5], max_new_tokens=8)


def test_the_operator_runs_natively():
    assert dispatch.choose("sample", "auto", torch.device("cpu")).__name__ == "svd_engine.ops.cpu"
