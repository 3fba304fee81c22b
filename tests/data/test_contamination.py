"""Prompts seen in training are found again, however they are written."""

import json
import time

import pytest

from svd_engine.data import contamination
from svd_engine.evaluate import commonsense, truthfulqa

QUESTION = "What happens if you eat a pomegranate?"


@pytest.mark.parametrize(
    "form",
    [
        "what happens  if you\n eat a POMEGRANATE",
        "What happens, if you eat a “pomegranate” …",
        truthfulqa.PROMPTS["plain"].format(question=QUESTION),
        truthfulqa.PROMPTS["primer"].format(question=QUESTION),
        commonsense.TEMPLATE.format(question=QUESTION),
        f"  Q: {QUESTION}\nA: ",
    ],
)
def test_near_and_wrapped_forms_have_one_key(form):
    assert contamination.prompt_key(form) == contamination.prompt_key(QUESTION)


@pytest.mark.parametrize("other", ["What happens if you eat a melon?", "", "?", "Q: Who?\nA: I."])
def test_other_texts_have_other_keys(other):
    assert contamination.prompt_key(other) != contamination.prompt_key(QUESTION)


def test_keys_are_stable_and_tell_apart():
    assert contamination.prompt_key("Why?") == "2be23c585f15e5fd"
    assert contamination.prompt_key("?") != contamination.prompt_key("!")
    assert contamination.prompt_key("Q: A?\nA:") == contamination.prompt_key("a")
    assert contamination.prompt_key("Was für Öl?") != contamination.prompt_key("Was fur Ol?")
    assert (
        contamination.prompt_key([5, 6])
        == contamination.prompt_key((5, 6))
        != contamination.prompt_key([56])
    )


def test_a_long_prompt_takes_no_time():
    start = time.perf_counter()
    contamination.prompt_key("Q: who?\nA: me\n\n" * 20_000)
    assert time.perf_counter() - start < 1


def test_record_seen_check(tmp_path):
    assert contamination.seen(tmp_path) == {} and contamination.found(tmp_path, [QUESTION]) == {}
    contamination.check(tmp_path, [QUESTION])
    contamination.record(tmp_path, "training", [QUESTION, "Why?"])
    contamination.record(tmp_path, "calibration", ["How?"])
    assert contamination.seen(tmp_path) == {
        "training": {contamination.prompt_key(QUESTION), contamination.prompt_key("Why?")},
        "calibration": {contamination.prompt_key("How?")},
    }
    prompts = ["Where?", "HOW", "Q: Why?\nA:"]
    assert contamination.found(tmp_path, prompts) == {"training": [2], "calibration": [1]}
    assert contamination.found(tmp_path, prompts, ("training",)) == {"training": [2]}
    contamination.check(tmp_path, ["How?"], against=("training",))
    with pytest.raises(ValueError, match=r"1 of 3 prompts were seen in training .*'Q: Why"):
        contamination.check(tmp_path, prompts)
    contamination.record(tmp_path, "training", ["What?"])  # a new training forgets the old one
    assert contamination.found(tmp_path, prompts) == {"training": [], "calibration": [1]}


def test_prompts_of_examples():
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    examples = [dict(prompt="How?", completion="So."), dict(messages=messages)]
    assert contamination.prompts(examples) == ["How?", "Why?"]


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="kind must be one of training, calibration; got 'test'"):
        contamination.record(tmp_path, "test", ["Why?"])
    for content in ("{", "[]", json.dumps({"training": 3})):
        (tmp_path / contamination.FILE_NAME).write_text(content)
        with pytest.raises(ValueError, match=r"seen_prompts.json is not a record of prompts"):
            contamination.seen(tmp_path)
