"""What is no text, no token ids and no conversation is refused by name, in one line."""

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.data.tokenization import encode_answers, encode_prompt
from tests.data import forms
from tests.tiny import tiny_peft

NOT_TEXT = {
    "number": 3, "boolean": True, "booleans": [True], "float": 1.5, "floats": [[1.5]],
    "None": [None], "object": {"a": 1}, "bytes": b"ab", "list of bytes": [b"ab"],
    "surrogate": ["a\ud800"], "iterator": iter(["a"]), "float tensor": torch.ones(2, 3),
    "float array": np.ones((2, 3)), "scalar tensor": torch.tensor(5), "negative": [[5, -1]],
    "huge": [[10**30]], "text and number": ["a", 5], "number and text": [5, "a"],
}  # fmt: skip


@pytest.fixture(scope="module")
def engine():
    tokenizer = forms.build("llama2", "bos, eos")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"
    return SteeredEngine(tiny_peft(), tokenizer, SteeringConfig(-1.0))


@pytest.mark.parametrize("what", NOT_TEXT)
def test_bad_inputs_are_refused_by_name(engine, what, monkeypatch):
    monkeypatch.setattr(engine.pair, "prefill", lambda *_: pytest.fail("the model was run"))
    bad = NOT_TEXT[what]
    calls = {
        "prompt": lambda: engine.generate(bad, max_new_tokens=2),
        "messages": lambda: engine.generate(messages=bad, max_new_tokens=2),
        "continuation": lambda: engine.score("a", bad),
        "prompt ": lambda: engine.score(bad, [" b"]),
    }
    if what not in ("number", "scalar tensor"):
        calls["token_id"] = lambda: engine.generate("a", eos_token_id=bad, max_new_tokens=2)
    for name, call in calls.items():
        with pytest.raises(ValueError) as raised:
            call()
        assert name.strip() in str(raised.value) and "\n" not in str(raised.value)


def test_a_text_is_one_answer_and_no_list_of_stop_strings(engine):
    assert engine.score("a", " Yes") == engine.score("a", [" Yes"])
    with pytest.raises(ValueError, match="stop_strings must be text or a list of texts; got 3"):
        engine.generate("a", stop_strings=3, max_new_tokens=2)


def test_tensors_and_arrays_of_integers_are_token_ids(engine):
    rows = [[5, 6, 7], [8, 9, 10]]
    wanted = [c.token_ids for c in engine.generate(rows, max_new_tokens=2)]
    for ids in (torch.tensor(rows), np.array(rows), tuple(map(tuple, rows))):
        assert [c.token_ids for c in engine.generate(ids, max_new_tokens=2)] == wanted


def test_a_tokenizer_in_python_too():
    """ByT5 puts </s> after every text: not after a prompt."""
    tokenizer = ByT5Tokenizer()
    assert tokenizer("ab").input_ids == [100, 101, 1]
    assert encode_prompt("ab", tokenizer) == [100, 101]
    assert encode_answers("ab", [" c", "d"], tokenizer) == ([100, 101], [[35, 102], [103]])
