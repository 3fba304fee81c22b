"""Teacher forcing: prompts shared by completions are computed once, and nothing else changes."""

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.generation import scoring
from svd_engine.kernels import reference
from svd_engine.model.pair import pair_models
from svd_engine.model.peft_adapter import Adapter
from tests.tiny import VOCAB, tiny_peft

PROMPTS = [[5, 17, 40, 9], [7], [120, 3, 88, 61, 14, 90]]
COMPLETIONS = [[9, 33, 2], [101], [55, 4, 4, 12, 77]]
PASSAGES = [scoring.Passage(p, c) for c in COMPLETIONS for p in PROMPTS]
METHODS = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}


@torch.no_grad()
def two_pass(model, prompt, completion):
    ids = torch.tensor([prompt + completion])
    adapted = model(ids).logits[0, len(prompt) - 1 : -1]
    with model.disable_adapter():
        base = model(ids).logits[0, len(prompt) - 1 : -1]
    target = torch.tensor(completion)
    return float(reference.score(adapted, base, -3.0, target, penalty=0.0).sum())


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize("form", ["paired", "sequential"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("slots", [8, 40, 2048])
def test_scores_equal_two_pass(monkeypatch, method, form, slots):
    monkeypatch.setattr(scoring, "BATCH_TOKENS", slots)
    model = tiny_peft("mistral", METHODS[method])
    pair = pair_models(Adapter.read(model), form)
    got = scoring.score(pair, PASSAGES, SteeringConfig(-3.0), 0.0)
    assert got == pytest.approx([two_pass(model, *passage) for passage in PASSAGES], abs=2e-4)


def test_a_shared_prompt_is_computed_once(monkeypatch):
    pair = pair_models(Adapter.read(tiny_peft("llama")), "paired")
    fed = []
    for name in ("prefill", "extend"):
        call = getattr(pair, name)

        def counted(rows, *rest, call=call):
            fed.append(len(rows))
            return call(rows, *rest)

        monkeypatch.setattr(pair, name, counted)
    scoring.score(pair, PASSAGES, SteeringConfig(-3.0), 0.0)
    assert fed == [3, 9]


# engine.score


@pytest.fixture(scope="module")
def engine(words):
    return SteeredEngine(tiny_peft("llama"), words, SteeringConfig(-3.0))


@torch.no_grad()
def by_hand(model, prompt, completion):
    """Log-probability of each token in float64, and whether greedy steered decoding writes all."""
    ids = torch.tensor([prompt + completion])
    adapted = model(ids).logits[0, len(prompt) - 1 : -1].double()
    with model.disable_adapter():
        base = model(ids).logits[0, len(prompt) - 1 : -1].double()
    left = reference.steer(adapted, base, -3.0, penalty=0.0).double().log_softmax(-1)
    best = reference.steer(adapted, base, -3.0).argmax(-1).tolist()
    return left[torch.arange(len(completion)), completion].tolist(), best == completion


def test_details_of_pairs(engine):
    greedy = [engine.generate([p], max_new_tokens=3)[0].token_ids for p in PROMPTS]
    continuations = [greedy[0], [101], [*greedy[2][:2], 9]]
    got = engine.score(PROMPTS, continuations, details=True)
    for score, prompt, continuation in zip(got, PROMPTS, continuations, strict=True):
        logprobs, is_greedy = by_hand(engine.model, prompt, continuation)
        assert score.token_ids == continuation and score.is_greedy == is_greedy
        assert score.logprobs == pytest.approx(logprobs, abs=2e-4)
    assert [s.is_greedy for s in got] == [True, False, False]
    assert engine.score(PROMPTS, continuations) == pytest.approx([s.logprob for s in got])
    for i, prompt in enumerate(PROMPTS):
        assert engine.score(prompt, [continuations[i]]) == pytest.approx([got[i].logprob], abs=1e-4)


def test_the_best_in_each_place_under_another_steering(engine):
    completion, k = [40, 9, 33], 3
    (got,) = engine.score(
        [[5, 17]], [completion], details=True, top_logprobs=k, steering=SteeringConfig(2.0)
    )
    ids = torch.tensor([[5, 17, *completion[:-1]]])
    with torch.no_grad():
        adapted = engine.model(ids).logits[0, 1:].float()
        with engine.model.disable_adapter():
            base = engine.model(ids).logits[0, 1:].float()
    want = reference.steer(adapted, base, 2.0, penalty=0.0).double().log_softmax(-1)
    for place, listed in enumerate(got.top_logprobs):
        best = want[place].topk(k)
        assert [token for token, _ in listed] == best.indices.tolist()
        assert [x for _, x in listed] == pytest.approx(best.values.tolist(), abs=2e-4)
        assert got.logprobs[place] == pytest.approx(float(want[place, completion[place]]), abs=2e-4)
    for k, message in ((VOCAB + 1, "at most the vocabulary's"), (-1, "an integer"), (1, "details")):
        with pytest.raises(ValueError, match=message):
            engine.score([[5, 17]], [completion], top_logprobs=k)


def test_one_text_is_one_continuation(engine):
    many = engine.score("w005 w017", [" w009 w033", " w101"])
    assert engine.score("w005 w017", " w009 w033") == pytest.approx(many[:1], abs=1e-5)
    assert engine.score([5, 17], [9, 33]) == pytest.approx(many[:1], abs=1e-5)
    assert engine.score([5, 17], torch.tensor([9, 33])) == pytest.approx(many[:1], abs=1e-5)
    assert engine.score(["w005 w017"], ["w101"]) == pytest.approx(many[1:], abs=1e-5)
    assert engine.score([5, 17], []) == engine.score([], []) == []


def test_the_prompt_itself(engine):
    got = engine.score([[5, 17, 40, 9], [7, 8]], details=True)
    for score, ids in zip(got, ([5, 17, 40, 9], [7, 8]), strict=True):
        assert score.token_ids == ids[1:]
        assert score.logprobs == pytest.approx(by_hand(engine.model, ids[:1], ids[1:])[0], abs=2e-4)
    assert engine.score("w005 w017 w040 w009") == pytest.approx([got[0].logprob], abs=1e-4)


def test_conversations(engine, words, monkeypatch):
    template = "{% for m in messages %}w010 {{ m.content }} {% endfor %}"
    monkeypatch.setattr(words, "chat_template", template)
    one = [dict(role="user", content="w005 w006")]
    truth = engine.score([10, 5, 6], [[101], [7, 7]])
    assert engine.score(messages=one, continuations=[" w101", "w007 w007"]) == pytest.approx(truth)
    both = engine.score(messages=[one, one], continuations=["w101", [7, 7]])
    assert both == pytest.approx(truth, abs=1e-5)
    whole = engine.score(messages=one)
    assert whole == pytest.approx(engine.score([10, 5, 6]))


@pytest.mark.parametrize(
    "message, arguments",
    {
        "give prompts or messages": dict(continuations="w005"),
        "one continuation for each of the 2 prompts": dict(prompts=[[5], [6]], continuations=[[7]]),
        "one continuation for each of the 1 prompts": dict(prompts=["w005"], continuations="w006"),
        r"prompts\[1\]: a continuation has no tokens": dict(
            prompts=[[5], [6]], continuations=[[7], []]
        ),
        "after its first token has no tokens": dict(prompts=[[5]]),
        "continuations must be text, token ids or a list": dict(prompts="w005", continuations=5),
        "prompts must be text, token ids, a conversation or a list": dict(
            prompts=5, continuations=["w005"]
        ),
        "no chat template": dict(messages=[dict(role="user", content="w005")]),
        "a conversation needs a chat template": dict(
            messages=[dict(role="user", content="w005")], continuations=" w006"
        ),
    }.items(),
)
def test_what_cannot_be_scored_is_said_before_any_work(engine, message, arguments, monkeypatch):
    monkeypatch.setattr(engine.pair, "prefill", lambda *_: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match=message):
        engine.score(**arguments)
