"""Prompts seen in training are found again, however they are written."""

# ruff: noqa: RUF001

import hashlib
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
    assert contamination.prompt_key("Why?") == "signs:2be23c585f15e5fd"
    assert contamination.prompt_key("?") != contamination.prompt_key("!")
    assert contamination.prompt_key("Q: A?\nA:") == contamination.prompt_key("a")
    assert contamination.prompt_key("Was für Öl?") != contamination.prompt_key("Was fur Ol?")
    assert (
        contamination.prompt_key([5, 6])
        == contamination.prompt_key((5, 6))
        != contamination.prompt_key([56])
    )


DIFFERENT = [
    ("What is 3 + 4?", "What is 3 - 4?", "What is 3 * 4?", "What is 3/4?", "What is 3 4?"),
    ("Who made C?", "Who made C++?", "Who made C#?", "Who made C-?"),
    ("What is 2³?", "What is 23?", "What is 2 3?", "What is 2₃³?"),
    ("Is a = b?", "Is a != b?", "Is a < b?", "Is a > b?", "Is a b?"),
    ("What is (1 + 2) * 3?", "What is 1 + (2 * 3)?", "What is 1 + 2 * 3?"),
    ("What is .5 squared?", "What is 5 squared?", "What is -5 squared?", "What is 5% squared?"),
    ("What is f(x)?", "What is f'(x)?", "What is f x?"),
    ("What costs $5?", "What costs €5?", "What costs 5?"),
    ("What is कि?", "What is की?", "What is क?"),
    ("What is 🙂?", "What is 🙁?"),
]
SAME = [
    ("What is 3 + 4?", "what is 3+4", "What is  3 +4 ?!", "Q: What is 3 ＋ 4?\nA:"),
    ("What is 3 - 4?", "What is 3−4?", "What is 3 – 4 ..."),
    ("What is x²?", "What is x^2?", "what is X ^ 2"),
    ("Is Paris - the well-known city - big?", "Is Paris, the well known city, big?"),
    ("Is Paris - the well-known city - big?", "Is Paris — the “well‑known” city — big"),
    ("¿Qué es?", "qué es"), ("什么是猫？", "什么是猫。"), ("I ❤\ufe0f C++", "i ❤ c ++"),
    ("Don't cats purr?", "don’t CATS purr!"),
    ("It is _ and big.", "It is _ and big"),
    ("What is a won\u00adder?", "What is a wonder"),
]  # fmt: skip


@pytest.mark.parametrize("texts", DIFFERENT, ids=[texts[0] for texts in DIFFERENT])
def test_symbols_count(texts):
    assert len({contamination.prompt_key(text) for text in texts}) == len(texts)


@pytest.mark.parametrize("texts", SAME, ids=[texts[0] for texts in SAME])
def test_case_spaces_and_punctuation_do_not(texts):
    assert len({contamination.prompt_key(text) for text in texts}) == 1


def test_a_record_of_an_earlier_version_still_refuses_what_it_refused(tmp_path):
    """Its keys are of words alone: sha256 of "what is 3 4" and "who made c", 16 hex digits."""
    words = ["what is 3 4", "who made c"]
    old = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in words]
    path = tmp_path / contamination.FILE_NAME
    path.write_text(json.dumps({"training": old}))
    prompts = ["What is 3 + 4?", "Who made C++?", "What is 5 + 4?"]
    assert contamination.found(tmp_path, prompts) == {"training": [0, 1]}
    contamination.record(tmp_path, "calibration", ["What is 5 + 4?"])  # beside it, in the new form
    asked = [*prompts, "What is 5 - 4?"]
    assert contamination.found(tmp_path, asked) == {"training": [0, 1], "calibration": [2]}
    contamination.record(tmp_path, "training", ["What is 3 + 4?"])
    asked = ["What is 3 + 4?", "What is 3 - 4?"]
    assert contamination.found(tmp_path, asked) == {"training": [0], "calibration": []}


def test_a_long_prompt_takes_no_time():
    start = time.perf_counter()
    contamination.prompt_key("Q: who?\nA: me\n\n" * 20_000)
    contamination.prompt_key("Is it 2³ or 3 – 4? " * 10_000)
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
    begun = {"role": "assistant", "content": "So"}
    shown = {"role": "user", "content": [{"type": "text", "text": "Who?"}, {"type": "image"}]}
    examples = [
        dict(messages=[*messages[:1], begun, messages[1]]),
        dict(prompt=[*messages[:1], begun], completion=[messages[1]]),
        dict(prompt=[shown], completion="I."),
        dict(prompt=[5, 6], completion=[7]),
    ]
    assert contamination.prompts(examples) == ["Why?", "Why?", "Who? ", [5, 6]]


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="kind must be one of training, calibration, "):
        contamination.record(tmp_path, "test", ["Why?"])
    for content in (
        "{",
        "[]",
        '{"training": 3}',
        '{"training": "ab"}',
        '{"training": [5]}',
        "[" * 9999,
    ):
        (tmp_path / contamination.FILE_NAME).write_text(content)
        with pytest.raises(ValueError, match=r"seen_prompts.json is not a record of prompts"):
            contamination.seen(tmp_path)
