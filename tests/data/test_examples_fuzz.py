"""Whatever a line holds: it becomes token ids of the vocabulary, or its place is named."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svd_engine.data import contamination, examples
from tests.data import forms

CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
KEYS = ["prompt", "completion", "accepted", "rejected", "messages", "role", "content", "tool_calls"]
scalars = (
    st.none() | st.booleans() | st.integers(-2, 400) | st.integers() | st.floats()
    | st.text(st.characters(), max_size=6) | st.sampled_from(["", " ", "assistant", "\ud800"])
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=8,
)


def joined(lists):
    """Both as one list if they are lists."""
    first, last = lists
    return [*first, *last] if isinstance(first, list) and isinstance(last, list) else first


def mostly(good, bad=values):
    return st.sampled_from([good] * 11 + [bad]).flatmap(lambda chosen: chosen)


texts = st.sampled_from(["Why?", " Yes", "It is", "\u2028 2 + 2"])
contents = mostly(texts)
ids = mostly(st.lists(st.integers(0, 360), min_size=1, max_size=3), st.lists(scalars, max_size=3))


def message(roles):
    return st.fixed_dictionaries({"role": mostly(st.sampled_from(roles)), "content": contents})


asked = mostly(st.lists(message(["system", "user", "assistant"]), min_size=1, max_size=3))
said = mostly(st.lists(message(["assistant"]), min_size=1, max_size=1))
answers = mostly(contents, ids | said)
more = {key: mostly(st.lists(answers, max_size=2)) for key in ("accepted", "rejected")}
lines = st.one_of(
    st.fixed_dictionaries({"prompt": mostly(contents, ids), "completion": answers}, optional=more),
    st.fixed_dictionaries({"prompt": asked, "completion": answers}, optional=more),
    st.fixed_dictionaries({"messages": st.tuples(asked, said).map(joined)}, optional=more),
    values,
)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = forms.build("byte-level", "bos, eos")
    tokenizer.chat_template = CHATML
    return tokenizer


@settings(max_examples=300, deadline=None)
@given(lines)
def test_any_example_is_encoded_or_refused_with_its_place(tokenizer, example):
    good = dict(prompt="Why?", completion=" Yes")
    try:
        found = examples.encode([good, example], tokenizer, len(tokenizer))[1]
    except ValueError as error:
        assert str(error).startswith("examples[1]: ") and "\n" not in str(error)
        return
    for tokens in (found.prompt, found.completion, *found.accepted, *found.rejected):
        assert tokens and all(type(t) is int and 0 <= t < len(tokenizer) for t in tokens)
    assert len(examples.fingerprint([example])) == 64
    assert len(contamination.prompt_key(contamination.prompts([example])[0])) > 15


@settings(max_examples=150, deadline=None)
@given(lines.map(json.dumps).map(str.encode) | st.binary(max_size=30))
def test_any_file_is_read_or_refused_with_its_line(tmp_path_factory, tokenizer, line):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(b'{"prompt": "Why?", "completion": " Yes"}\n\n' + line)
    try:
        examples.encode(examples.read(path), tokenizer, len(tokenizer))
    except ValueError as error:
        assert re.fullmatch(rf"{re.escape(str(path))}:[3-9]\d*: [^\n]+", str(error))
