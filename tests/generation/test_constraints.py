"""Constraints: transformers' at strength 0, by hand in float64 with steering, and never nothing."""

import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.generation import request
from svd_engine.generation.sampling_params import SamplingParams
from svd_engine.kernels import reference
from tests.tiny import PROMPTS, VOCAB, tiny_peft

NEW = 10


@pytest.fixture(scope="module")
def model():
    return tiny_peft()


@pytest.fixture
def engine(model, words):
    return SteeredEngine(model, words, SteeringConfig(0.0, alpha=0.0))


def transformers(model, prompt, **options):
    ids = torch.tensor([prompt])
    options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=2, pad_token_id=0) | options
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(prompt) :].tolist()


def even(_, token_ids):
    return range(0, VOCAB, 2) if len(token_ids) % 2 else [7, 9, 11]


FREE = {tuple(p): transformers(tiny_peft(), p) for p in PROMPTS[:1]}
(FIRST, SECOND, THIRD, *_), *_ = FREE.values()
CONSTRAINTS = {
    "min_new_tokens": dict(min_new_tokens=6, eos_token_id=[2, FIRST, SECOND, THIRD]),
    "min_length": dict(min_length=9, eos_token_id=[2, FIRST, SECOND, THIRD]),
    "no_repeat_ngram_size": dict(no_repeat_ngram_size=1),
    "bigrams": dict(no_repeat_ngram_size=2),
    "bad_words_ids": dict(bad_words_ids=[[FIRST], [SECOND, THIRD], [2]]),
    "suppress_tokens": dict(suppress_tokens=[FIRST, SECOND]),
    "begin_suppress_tokens": dict(begin_suppress_tokens=[FIRST]),
    "forced_bos_token_id": dict(forced_bos_token_id=17, begin_suppress_tokens=[FIRST]),
    "forced_eos_token_id": dict(forced_eos_token_id=[31]),
    "sequence_bias": dict(sequence_bias={(FIRST,): -7.5, (SECOND, THIRD): 3.0, (40,): 5.0}),
    "sequence_bias, listed": dict(sequence_bias=[[[FIRST], -7.5], [[SECOND, THIRD], 3.0]]),
    "prefix_allowed_tokens_fn": dict(prefix_allowed_tokens_fn=even),
    "several": dict(
        repetition_penalty=1.4, no_repeat_ngram_size=2, suppress_tokens=[FIRST], min_length=8,
        sequence_bias={(40,): 1.0}, forced_eos_token_id=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("beams", [{}, dict(num_beams=3)], ids=["greedy", "beams"])
def test_strength_0_is_transformers(model, engine, name, beams):
    """Alone and in a ragged batch, as keywords and in a GenerationConfig."""
    options = {"eos_token_id": 2} | CONSTRAINTS[name] | beams
    truth = [transformers(model, prompt, **options) for prompt in PROMPTS]
    got = engine.generate(PROMPTS, max_new_tokens=NEW, **options)
    assert [c.token_ids for c in got] == truth
    function = options.pop("prefix_allowed_tokens_fn", None)
    config = GenerationConfig(max_new_tokens=NEW, **options)
    again = engine.generate(
        PROMPTS, generation_config=config, prefix_allowed_tokens_fn=function, batch_size=1
    )
    assert [c.token_ids for c in again] == truth
    if not beams:
        streamed = list(engine.stream(PROMPTS[0], max_new_tokens=NEW, **CONSTRAINTS[name]))
        assert [event.token_id for event in streamed] == truth[0]
        plain = engine.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=options["eos_token_id"])
        assert [c.token_ids for c in plain] != truth


@torch.no_grad()
def plain_logits(model, ids):
    """Adapted and base logits after `ids`, in float64."""
    adapted = model(torch.tensor([ids])).logits[0, -1].double()
    with model.disable_adapter():
        return adapted, model(torch.tensor([ids])).logits[0, -1].double()


def by_hand(model, prompt, constrain, strength=-4.0, alpha=0.1):
    """Greedy tokens: constrain(logits, new) gives a row's logits in place.

    Where nothing of the support is left, the adapted model's order counts.
    """
    new = []
    while len(new) < NEW and (not new or new[-1] != 2):
        adapted, base = plain_logits(model, prompt + new)
        steered = reference.steer(adapted[None], base[None], strength, alpha=alpha)[0].double()
        rows = [constrain(row.clone(), new) for row in (steered, adapted)]
        row = rows[0] if rows[0].isfinite().any() else rows[1]
        assert row.isfinite().any()
        new.append(int(row.argmax()))
    return new


def without(row, tokens):
    row[list(tokens)] = -torch.inf
    return row


def no_bigram_twice(prompt, row, new):
    seen = [*prompt, *new]
    return without(row, [b for a, b in itertools.pairwise(seen) if a == seen[-1]])


def counted(row, new, presence, frequency):
    for token in set(new):
        row[token] -= presence + frequency * new.count(token)
    return row


@pytest.mark.parametrize("alpha", [0.1, 0.0])
def test_steered_constraints_equal_float64(model, engine, alpha):
    engine.steering = SteeringConfig(-4.0, alpha=alpha)
    free = engine.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=2)
    five, six = torch.eye(VOCAB, dtype=torch.float64)[[5, 6]]
    for i, prompt in enumerate(PROMPTS[:2]):
        gone = set(free[i].token_ids)
        cases = [
            (dict(suppress_tokens=sorted(gone)), lambda row, _, gone=gone: without(row, gone)),
            (dict(no_repeat_ngram_size=2), partial(no_bigram_twice, prompt)),
            (dict(min_new_tokens=NEW), lambda row, _: without(row, [2])),
            (
                dict(presence_penalty=1.5, frequency_penalty=0.5),
                lambda row, new: counted(row, new, 1.5, 0.5),
            ),
            (dict(presence_penalty=-2.0), lambda row, new: counted(row, new, -2.0, 0.0)),
            (dict(prefix_allowed_tokens_fn=lambda *_: [3, 90]),
             lambda row, _: without(row, set(range(VOCAB)) - {3, 90})),
            (dict(logit_bias={"5": 9.0, 6: -1.0}),
             lambda row, _: row + 9.0 * five - six),
        ]  # fmt: skip
        for options, constrain in cases:
            got = engine.generate(prompt, max_new_tokens=NEW, eos_token_id=2, **options)[0]
            assert got.token_ids == by_hand(model, prompt, constrain, alpha=alpha), options


# something is always left


def test_below_the_support_the_adapted_model_decides(model, engine):
    """At alpha 1 a support has one token; without it, the adapted model's next best is taken."""
    engine.steering = SteeringConfig(-4.0, alpha=1.0)
    adapted, _ = plain_logits(model, PROMPTS[0])
    first, second, third = adapted.topk(3).indices.tolist()
    for options, wanted in (
        (dict(suppress_tokens=[first]), second),
        (dict(bad_words_ids=[[first], [second]]), third),
        (dict(logit_bias={first: -float("inf")}), second),
        (dict(prefix_allowed_tokens_fn=lambda *_: [third, second]), second),
        (dict(forced_eos_token_id=third, max_length=len(PROMPTS[0]) + 1), third),
        (dict(suppress_tokens=[first], num_beams=2), second),
    ):
        options = dict(max_new_tokens=1) | options
        if "max_length" in options:
            del options["max_new_tokens"]
        (got,) = engine.generate(PROMPTS[0], **options)
        assert got.token_ids == [wanted]
        if "num_beams" not in options and "forced_eos_token_id" not in options:
            left = adapted.clone()
            left[[first] if wanted == second else [first, second]] = -torch.inf
            if "prefix_allowed_tokens_fn" in options:
                left = without(left, set(range(VOCAB)) - {second, third})
            truth = float(left.log_softmax(-1)[wanted])
            assert got.logprobs[0] == pytest.approx(truth, abs=1e-4)


@pytest.mark.parametrize("beams", [{}, dict(num_beams=3)])
def test_constraints_that_leave_nothing_are_an_error(engine, beams):
    engine.steering = SteeringConfig(-4.0)
    with pytest.raises(ValueError, match=r"the constraints remove every token after the tokens"):
        engine.generate([[5], [6, 7]], suppress_tokens=range(VOCAB), max_new_tokens=2, **beams)


def test_a_bias_brings_no_token_back(model, engine):
    engine.steering = SteeringConfig(-4.0, alpha=1.0)
    free = engine.generate(PROMPTS, max_new_tokens=3)
    biased = engine.generate(PROMPTS, max_new_tokens=3, logit_bias={5: 100.0})
    assert [c.token_ids for c in biased] == [c.token_ids for c in free]


def test_logits_that_are_not_finite_stay_an_error(engine, monkeypatch):
    rows = torch.zeros(1, VOCAB), torch.full((1, VOCAB), float("nan"))
    monkeypatch.setattr(engine.pair, "logits", lambda hidden: rows)
    with pytest.raises(ValueError, match="not finite"):
        engine.generate([5], max_new_tokens=2, suppress_tokens=[3])


# cuts


@pytest.mark.parametrize(
    "options",
    [dict(typical_p=0.4), dict(epsilon_cutoff=0.02), dict(eta_cutoff=0.3),
     dict(typical_p=0.7, top_k=30, top_p=0.95, epsilon_cutoff=0.02)],
    ids=str,
)  # fmt: skip
def test_cuts_are_those_of_transformers(model, engine, options):
    """On the steered distribution after the temperature; drawn log-probabilities are without."""
    engine.steering, heat = SteeringConfig(1.0, alpha=0.001), 3.0
    adapted, base = plain_logits(model, PROMPTS[0])
    steered = reference.steer(adapted[None], base[None], 1.0, alpha=0.001).double()
    warpers = {
        "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "typical_p": TypicalLogitsWarper,
        "epsilon_cutoff": EpsilonLogitsWarper, "eta_cutoff": EtaLogitsWarper,
    }  # fmt: skip
    chain = [TemperatureLogitsWarper(heat)]
    chain += [warpers[name](options[name]) for name in warpers if name in options]
    left = LogitsProcessorList(chain)(None, steered)[0].softmax(-1)
    assert 1 < int((left > 0).sum()) < int(steered.isfinite().sum())
    draws = 600
    got = engine.generate(
        PROMPTS[0], max_new_tokens=1, temperature=heat, num_return_sequences=draws,
        batch_size=draws, **options,
    )  # fmt: skip
    tokens = torch.tensor([c.token_ids[0] for c in got])
    share = tokens.bincount(minlength=VOCAB) / draws
    assert not share[left == 0].any()
    assert float((share - left).abs().max()) < 0.07
    logprobs = torch.tensor([c.logprobs[0] for c in got]).double()
    torch.testing.assert_close(logprobs, steered.log_softmax(-1)[0, tokens], atol=1e-4, rtol=0)
    greedy = engine.generate(PROMPTS[0], max_new_tokens=4)
    assert engine.generate(PROMPTS[0], max_new_tokens=4, **options) == greedy


# time


def test_max_time(engine, monkeypatch):
    truth = engine.generate(PROMPTS, max_new_tokens=5, eos_token_id=[])
    assert engine.generate(PROMPTS, max_new_tokens=5, eos_token_id=[], max_time=900.0) == truth

    def steps(count):  # until the time is over
        times = itertools.chain([0.0] * count, itertools.repeat(float("inf")))
        monkeypatch.setattr(request, "time", SimpleNamespace(perf_counter=lambda: next(times)))

    options = dict(max_new_tokens=50, eos_token_id=[], max_time=4.0)
    free = engine.generate(PROMPTS, max_new_tokens=50, eos_token_id=[])
    steps(3)
    got = engine.generate(PROMPTS, **options)
    assert [c.token_ids for c in got] == [c.token_ids[:3] for c in free]
    assert [c.text for c in got] == [engine.tokenizer.decode(c.token_ids) for c in got]
    assert [c.finish_reason for c in got] == ["time"] * 4
    steps(3)
    (*first, last) = engine.stream(PROMPTS[0], **options)
    assert len(first) == 2 and {e.finish_reason for e in first} == {None}
    assert last.finish_reason == "time"
    steps(3)
    found = engine.generate(PROMPTS, num_beams=2, **options)
    wanted = engine.generate(PROMPTS, num_beams=2, max_new_tokens=3, eos_token_id=[])
    assert [c.token_ids for c in found] == [c.token_ids for c in wanted]
    for beams in ({}, dict(num_beams=2)):
        steps(2)  # prompts that come later get nothing
        got = engine.generate([[5], [6]], batch_size=1, **beams, **options)
        assert [c.completion_tokens for c in got] == [2, 0]
        assert got[1].finish_reason == "time"


# refusals

BAD = {
    "min_new_tokens must be an integer": dict(min_new_tokens=2.5),
    "min_new_tokens = 9 must be at most the new tokens": dict(min_new_tokens=9, max_new_tokens=4),
    "min_length must be an integer": dict(min_length=True),
    "no_repeat_ngram_size must be an integer": dict(no_repeat_ngram_size=-1),
    "bad_words_ids must be a list": dict(bad_words_ids="word"),
    "bad_words_ids must hold sequences": dict(bad_words_ids=[5]),
    "bad_words_ids must hold sequences .* not empty": dict(bad_words_ids=[[]]),
    "bad_words_ids has token ids from 5 to 211": dict(bad_words_ids=[[5, VOCAB]]),
    "suppress_tokens must hold token ids": dict(suppress_tokens=[-1]),
    "suppress_tokens: token ids must be": dict(suppress_tokens=["5"]),
    "suppress_tokens has token ids": dict(suppress_tokens=[999]),
    "begin_suppress_tokens: token ids must be": dict(begin_suppress_tokens=[1.5]),
    "forced_bos_token_id must be an integer": dict(forced_bos_token_id="w005"),
    "forced_eos_token_id has token ids from 900": dict(forced_eos_token_id=900),
    "sequence_bias must map": dict(sequence_bias=[5]),
    "sequence_bias must be a number": dict(sequence_bias={(5,): "much"}),
    "logit_bias must map": dict(logit_bias=[[5, 1.0]]),
    "logit_bias: token ids must be": dict(logit_bias={"five": 1.0}),
    "logit_bias must be finite": dict(logit_bias={5: float("nan")}),
    "presence_penalty must be a number": dict(presence_penalty="1"),
    "frequency_penalty must be finite": dict(frequency_penalty=float("inf")),
    "prefix_allowed_tokens_fn must be a function": dict(prefix_allowed_tokens_fn=[5]),
    r"typical_p must lie in \(0, 1\]": dict(typical_p=1.5),
    r"epsilon_cutoff must lie in \[0, 1\)": dict(epsilon_cutoff=1.0),
    "eta_cutoff must be a number": dict(eta_cutoff=True),
    "max_time must be > 0": dict(max_time=0.0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_constraints_are_refused_before_any_work(engine, message, monkeypatch):
    monkeypatch.setattr(engine.pair, "prefill", lambda *_: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match=message):
        engine.generate(PROMPTS, **{"max_new_tokens": 12} | BAD[message])


@pytest.mark.parametrize(
    "allowed, message",
    [([], "returned an empty list"), ([VOCAB], "allowed the token 211; the vocabulary has 211"),
     (5.0, "prefix_allowed_tokens_fn: token ids must be"), (["a"], "token ids must be")],
)  # fmt: skip
def test_a_function_that_allows_no_tokens_is_named(engine, allowed, message):
    with pytest.raises(ValueError, match=message):
        engine.generate(PROMPTS, max_new_tokens=3, prefix_allowed_tokens_fn=lambda *_: allowed)


@pytest.mark.parametrize("options", [{}, dict(num_beams=2, num_return_sequences=2)])
def test_the_function_gets_the_index_of_transformers(model, engine, options):
    def seen(run):
        calls = set()
        run(lambda index, ids: calls.add((index, tuple(ids.tolist()))) or [int(ids[-1])])
        return calls

    prompts = torch.tensor([[5, 6], [7, 8]])
    options = options | dict(max_new_tokens=2, eos_token_id=2)
    plain = dict(attention_mask=torch.ones_like(prompts), pad_token_id=0, do_sample=False)
    ours = seen(lambda f: engine.generate(prompts, prefix_allowed_tokens_fn=f, **options))
    theirs = seen(
        lambda f: model.generate(input_ids=prompts, prefix_allowed_tokens_fn=f, **plain, **options)
    )
    assert {i for i, _ in ours} == {0, 1} and ours <= theirs


@pytest.mark.parametrize(
    "theirs, ours",
    [("max_tokens", "max_new_tokens"), ("stop", "stop_strings"), ("n", "num_return_sequences"),
     ("logprobs", "top_logprobs"), ("ignore_eos", r"eos_token_id=\[\]")],
)  # fmt: skip
def test_the_names_of_others_are_answered_with_ours(engine, theirs, ours):
    with pytest.raises(TypeError, match=f"'{theirs}'; here it is {ours}"):
        engine.generate(PROMPTS, **{theirs: 3})


def test_a_request_without_constraints_is_drawn_by_the_fused_operator(engine):
    off = {name: getattr(SamplingParams(), name) for name in vars(SamplingParams())}
    made = engine._request(PROMPTS, False, **off | dict(max_new_tokens=4))
    assert made.constrain is None and made.process_logits is None
    made = engine._request(PROMPTS, False, max_new_tokens=4, min_new_tokens=3, eos_token_id=[])
    assert made.constrain is None  # nothing ends a sequence
