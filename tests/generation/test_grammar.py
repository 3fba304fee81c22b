"""Texts of a form: steered tokens by hand in float64, over a language written out."""

import itertools
import json
import re

import pytest
import torch

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.generation import text_form
from svd_engine.generation.grammar import Grammar, GrammarProcessor
from svd_engine.generation.sequence import Sequence
from svd_engine.kernels import reference
from tests.tiny import PROMPTS, VOCAB, tiny_peft

pytest.importorskip("llguidance", reason='pip install "svd-engine[grammar]"')

REGEX = r"(yes|no)[!?]{1,3}( true| 42)?"
TEXTS = [
    answer + "".join(marks) + rest
    for answer in ("yes", "no")
    for count in (1, 2, 3)
    for marks in itertools.product("!?", repeat=count)
    for rest in ("", " true", " 42")
]
SCHEMA = {
    "type": "object",
    "properties": {
        "sure": {"type": "boolean"},
        "count": {"type": "integer", "minimum": 0, "maximum": 12},
        "kinds": {"type": "array", "items": {"enum": ["x", "yz"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["sure", "count", "kinds"],
    "additionalProperties": False,
}
END, NEW = 2, 60


@pytest.fixture(scope="module")
def model():
    return tiny_peft()


@pytest.fixture
def engine(model, letters):
    return SteeredEngine(model, letters, SteeringConfig(-4.0, alpha=0.1))


def spelled(tokenizer):
    """The text of each token that has one."""
    ids = range(3, len(tokenizer))
    return {i: tokenizer.decode([i]) for i in ids}


def allowed(tokenizer, text):
    """The tokens after which some text of the language is still possible."""
    tokens = [
        i for i, t in spelled(tokenizer).items() if any(x.startswith(text + t) for x in TEXTS)
    ]
    return tokens + [END] * (text in TEXTS)


@torch.no_grad()
def logits(model, ids):
    adapted = model(torch.tensor([ids])).logits[0, -1].double()
    with model.disable_adapter():
        return adapted, model(torch.tensor([ids])).logits[0, -1].double()


def by_hand(model, tokenizer, prompt, strength=-4.0, alpha=0.1):
    """Greedy tokens and log-probabilities, and how often nothing of the support was allowed."""
    new, logprobs, below = [], [], 0
    while not new or new[-1] != END:
        adapted, base = logits(model, prompt + new)
        steered = reference.steer(adapted[None], base[None], strength, alpha=alpha)[0].double()
        keep = allowed(tokenizer, tokenizer.decode(new))
        rows = [torch.full_like(row, -torch.inf) for row in (steered, adapted)]
        for row, full in zip(rows, (steered, adapted), strict=True):
            row[keep] = full[keep]
        is_below = not rows[0].isfinite().any()
        row, below = rows[is_below], below + is_below
        new.append(int(row.argmax()))
        logprobs.append(float(row.log_softmax(-1)[new[-1]]))
    return new, logprobs, below


@pytest.mark.parametrize("alpha", [0.1, 0.0])
def test_tokens_are_those_by_hand(model, engine, letters, alpha):
    """In a ragged batch, alone, streamed, submitted and guessed, whatever else is decoded."""
    engine.steering = SteeringConfig(-4.0, alpha=alpha)
    truth = [by_hand(model, letters, prompt, alpha=alpha) for prompt in PROMPTS]
    assert (sum(below for *_, below in truth) > 0) == (alpha > 0)
    options = dict(max_new_tokens=NEW, regex=REGEX)
    got = engine.generate(PROMPTS, **options)
    for completion, (tokens, logprobs, _) in zip(got, truth, strict=True):
        assert completion.token_ids == tokens and completion.text in TEXTS
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-3)
        assert (completion.finish_reason, completion.stop_reason) == ("stop", END)
    streams = [engine.submit(prompt, **options) for prompt in PROMPTS]
    plain = engine.submit(PROMPTS, max_new_tokens=12)
    for i, prompt in enumerate(PROMPTS):
        wanted = truth[i][0]
        assert engine.generate(prompt, **options, top_logprobs=2)[0].token_ids == wanted
        assert [event.token_id for event in engine.stream(prompt, **options)] == wanted
        assert [c.token_ids for c in streams[i].completions()] == [wanted]
    assert (
        plain.completions()[0].token_ids == engine.generate(PROMPTS, max_new_tokens=12)[0].token_ids
    )
    if "native" in engine.step:
        guessed = engine.generate(PROMPTS, **options, speculate="prompt")
        assert [c.token_ids for c in guessed] == [tokens for tokens, *_ in truth]


def test_draws_are_of_the_language(engine):
    options = dict(max_new_tokens=NEW, temperature=3.0, num_return_sequences=40)
    texts = [c.text for c in engine.generate(PROMPTS[:2], regex=REGEX, **options)]
    assert set(texts) <= set(TEXTS) and len(set(texts)) > 8


def test_beams_are_those_of_transformers(model, engine, letters):
    """Their function that allows tokens gets them from the language."""
    engine.steering = SteeringConfig(0.0, alpha=0.0)
    for prompt in PROMPTS:
        ids, size = torch.tensor([prompt]), len(prompt)

        def function(_, row, size=size):
            return allowed(letters, letters.decode(row[size:])) or [END]

        wanted = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=3, do_sample=False,
            max_new_tokens=NEW, eos_token_id=END, pad_token_id=0, num_return_sequences=2,
            prefix_allowed_tokens_fn=function,
        )  # fmt: skip
        got = engine.generate(
            prompt, max_new_tokens=NEW, num_beams=3, num_return_sequences=2, regex=REGEX
        )
        for completion, row in zip(got, wanted[:, size:].tolist(), strict=True):
            assert completion.token_ids == row[: len(completion.token_ids)]
            assert {*row[len(completion.token_ids) :]} <= {0, END} and completion.text in TEXTS


def test_json(engine, letters):
    """Without the spaces that may stand between the parts, of which a random model writes many."""
    space = {token: -100.0 for token in letters.convert_tokens_to_ids(["Ġ", "Ċ"])}
    options = dict(max_new_tokens=100, logit_bias=space, temperature=1.5, num_return_sequences=2)
    got = engine.generate(PROMPTS, json_schema=SCHEMA, **options)
    assert engine.generate(PROMPTS, json_schema=json.dumps(SCHEMA), **options) == got
    for completion in got:
        found = json.loads(completion.text)
        assert found.keys() == SCHEMA["properties"].keys()
        assert isinstance(found["sure"], bool) and 0 <= found["count"] <= 12
        assert 1 <= len(found["kinds"]) <= 2 and {*found["kinds"]} <= {"x", "yz"}


def test_spaces_of_json_end(engine, letters):
    """A model that would write nothing else writes the next part at last."""
    engine.steering = SteeringConfig(0.0, alpha=0.0)
    spaces = {token: 1000.0 for token in letters.convert_tokens_to_ids(["Ġ", "Ċ"])}
    (got,) = engine.generate(PROMPTS[0], max_new_tokens=100, json_schema=SCHEMA, logit_bias=spaces)
    runs = [len(run) for run in re.findall(r"\s+", got.text)]
    assert 1 < max(runs) <= 32 < got.completion_tokens


def test_an_end_stands_only_where_the_text_is_whole(engine, letters):
    """Whichever tokens end it, those of the tokenizer among them or not."""
    mark = letters.convert_tokens_to_ids("!")
    for ends in (mark, [mark, END], [90]):
        for c in engine.generate(PROMPTS, max_new_tokens=NEW, regex="yes(no)?", eos_token_id=ends):
            assert letters.decode(c.token_ids[:-1]) in ("yes", "yesno")
            assert c.token_ids[-1] in ([ends] if isinstance(ends, int) else ends)


# refusals

BAD = {
    "regex must be a text; got 5": dict(regex=5),
    "regex cannot be used: unclosed group": dict(regex="(yes"),
    "regex cannot be used: look-around": dict(regex="(?=a)b"),
    "regex has no text that the vocabulary can write": dict(regex=r"[^\x00-\x{10FFFF}]"),
    "regex needs a token that ends the text": dict(regex="yes", eos_token_id=[]),
    "regex says which tokens may come; leave out forced_bos": dict(
        regex="yes", forced_bos_token_id=5
    ),
    "regex and json_schema are two forms": dict(regex="yes", json_schema={}),
    "json_schema must be JSON: Expecting": dict(json_schema="{'type': 1}"),
    "json_schema must be JSON: Object of type set": dict(json_schema={"enum": {1}}),
    "json_schema must be JSON: Out of range": dict(json_schema={"const": float("nan")}),
    "json_schema must be an object; got .5": dict(json_schema=[5]),
    "json_schema cannot be used: Invalid type: objec": dict(json_schema={"type": "objec"}),
    "json_schema cannot be used: Unimplemented keys": dict(json_schema={"not": {}}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_forms_are_refused_before_any_work(engine, message, monkeypatch):
    monkeypatch.setattr(engine.pair, "prefill", lambda *_: pytest.fail("the model was run"))
    for call in (engine.generate, engine.stream, engine.submit):
        with pytest.raises(ValueError, match=message):
            call(PROMPTS, max_new_tokens=12, **BAD[message])


def test_without_the_library_its_install_is_named(engine, monkeypatch):
    monkeypatch.setattr(text_form, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'svd-engine\[grammar\]' installs it\.$"):
        engine.generate(PROMPTS, regex="yes")


def test_a_tokenizer_that_the_library_cannot_read(model, words):
    for tokenizer, message in ((words, "can read, and this .* is none: can't"), (None, "pass one")):
        engine = SteeredEngine(model, tokenizer, SteeringConfig(-4.0))
        with pytest.raises(ValueError, match=f"regex needs a tokenizer.*{message}"):
            engine.generate(PROMPTS, max_new_tokens=9, regex="yes")


def test_a_processor_against_the_form_is_named(engine):
    def other(ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([50]), 0.0)

    with pytest.raises(ValueError, match=r"regex does not allow the tokens .* logits processor"):
        engine.generate(PROMPTS, regex="yes", logits_processor=[other], max_new_tokens=3)


def test_a_form_that_becomes_too_much_work_is_named(letters):
    from llguidance import LLMatcher, LLParserLimits
    from llguidance.hf import from_tokenizer

    read = from_tokenizer(letters, n_vocab=VOCAB)
    form = text_form.read("((a|b)*c(a|b){40}d)+", None)
    limits = LLParserLimits(max_lexer_states=12)
    start = LLMatcher(read, form.grammar, log_level=0, limits=limits)
    process = GrammarProcessor(
        Grammar("regex", start, read), Sequence(0, [5], 9, eos_token_ids={2})
    )
    row = torch.zeros(1, VOCAB)
    with pytest.raises(ValueError, match=r"regex became too much work after the tokens .* simpler"):
        for length in range(60):
            process(torch.tensor([[5, *letters("abcab" * 12).input_ids[:length]]]), row)
