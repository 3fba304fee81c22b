"""Examples: what is read, how it is encoded, and which line is blamed."""

import pytest

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.data import examples
from svd_engine.training.warm_start import warm_start
from tests.tiny import VOCAB, tiny_base, tiny_peft


def lines(tmp_path, *rows):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def test_read_and_encode(tmp_path, words):
    path = lines(
        tmp_path,
        '{"prompt": "w005 w006", "completion": "w007", "accepted": ["w009"], "rejected": ["w008"]}',
        "",
        '{"prompt": [5], "completion": [6, 7]}',
    )
    first, second = examples.encode(examples.read(path), words)
    assert first == examples.Example([5, 6], [7], ([9],), ([8],))
    assert second == examples.Example([5], [6, 7])


def test_messages_go_through_the_chat_template(words):
    words.chat_template = (
        "{% for m in messages %}w010 {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}w011{% endif %}"
    )
    messages = [{"role": "user", "content": "w020"}, {"role": "assistant", "content": "w021"}]
    try:
        (example,) = examples.encode([dict(messages=messages, rejected=["w022"])], words)
    finally:
        words.chat_template = None
    assert example == examples.Example([10, 20, 11], [21], (), ([22],))
    with pytest.raises(ValueError, match="needs a chat template"):
        examples.encode([dict(messages=messages)], words)


CHATML = (
    "{% for m in messages %}w010 {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}w010 {% endif %}"
)
ASKED = [{"role": "user", "content": "w020"}]


def said(content):
    return [{"role": "assistant", "content": content}]


def test_prompts_and_answers_may_be_messages(words):
    """TRL's conversational prompt and completion are what `messages` of both are."""
    words.chat_template = CHATML
    try:
        (plain,) = examples.encode([dict(messages=[*ASKED, *said("w021")])], words)
        rows = [
            dict(prompt=ASKED, completion=said("w021")),
            dict(prompt=ASKED, completion="w021"),
            dict(prompt=ASKED, completion=said("w021"), accepted=[said("w022"), "w023"]),
            dict(prompt=ASKED, completion=said("w021"), rejected=[said("w022"), said("w023")]),
            dict(prompt=ASKED, completion=said("w021"), rejected=said("w022")),
            dict(messages=[*ASKED, *said("w021")], rejected=[said("w022"), [23]]),
        ]
        got = examples.encode(rows, words)
    finally:
        words.chat_template = None
    assert plain == examples.Example([10, 20, 10], [21])
    assert [example.prompt + example.completion for example in got] == [[10, 20, 10, 21]] * 6
    assert [example.accepted for example in got] == [(), (), ([22], [23]), (), (), ()]
    wrong = [(), (), (), ([22], [23]), ([22],), ([22], [23])]
    assert [example.rejected for example in got] == wrong


GOOD = '{"prompt": "a", "completion": "b"}'
GOOD_IDS = '{"prompt": [5], "completion": [6]}'
BAD = {
    "{prompt: 1}": "not JSON",
    "[1]": "an example is an object; got list",
    '{"prompt": "a"}': "'completion' is missing",
    '{"prompt": "", "completion": "b"}': "prompt is empty",
    '{"prompt": "a", "completion": ""}': "an answer is empty",
    '{"prompt": "a", "completion": 3}': "text or token ids",
    '{"prompt": "a", "completion": "b", "rejected": "c"}': "rejected must be a list",
    '{"prompt": "a", "completion": "b", "rejected": [""]}': "an answer is empty",
    '{"messages": []}': "messages must hold",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}': (
        "must be the assistant's"
    ),
}
BAD |= {
    '{"prompt": [1, 2.5], "completion": "b"}': "one of its token ids is 2.5",
    '{"prompt": [1, true], "completion": "b"}': "one of its token ids is True",
    '{"prompt": "a", "completion": [-1]}': "one of its token ids is -1",
    '{"prompt": {"a": 1}, "completion": "b"}': "prompt is text or token ids",
    '{"prompt": "a", "completion": null}': "an answer is text or token ids; got None",
    '{"prompt": "\\ud800", "completion": "b"}': "is not Unicode",
    '{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}': "needs a prompt of",
    '{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "user", "content": '
    '"b"}]}': "an answer is one message of the assistant; got user",
    '{"prompt": [{"role": "user", "content": 3}], "completion": "b"}': "content must be text; got",
    '{"prompt": [{"content": "a"}], "completion": "b"}': r"prompt\[0\]: role must be text",
    '{"messages": [3, {"role": "assistant", "content": "b"}]}': r"messages\[0\] must be",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}': (
        "an answer is empty"
    ),
    "[" * 100_000: "not JSON",
    '{"prompt": ' + "9" * 5000 + "}": "not JSON",
}


@pytest.mark.parametrize("line", BAD, ids=[line[:60] for line in BAD])
def test_the_error_names_file_and_line(tmp_path, line):
    path = lines(tmp_path, GOOD, line)
    with pytest.raises(ValueError, match=BAD[line]) as raised:
        examples.read(path)
    assert str(raised.value).startswith(f"{path}:2: ")


def test_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match="holds no examples"):
        examples.read(lines(tmp_path, "", " "))
    with pytest.raises(ValueError, match="does not exist"):
        examples.read(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="needs a tokenizer"):
        examples.encode([dict(prompt="a", completion="b")], None)


def test_what_is_wrong_only_as_tokens_is_told_with_its_line_too(tmp_path, words):
    rows = examples.read(lines(tmp_path, "", GOOD_IDS, '{"prompt": [5], "completion": [300]}'))
    place = rf"{tmp_path}/data.jsonl:3: "
    with pytest.raises(ValueError, match=rf"^{place}an answer has token ids from 300 to 300; the"):
        examples.encode(rows, words, VOCAB)
    with pytest.raises(ValueError, match=rf"^{place}"):  # in another order, or among others
        examples.encode([dict(prompt=[5], completion=[6]), *reversed(rows)], words, VOCAB)
    with pytest.raises(ValueError, match=r"^examples\[1\]: prompt has token ids from 5 to 211"):
        examples.encode([dict(prompt=[5, i], completion=[6]) for i in (5, VOCAB)], words, VOCAB)
    with pytest.raises(ValueError, match=r"^examples\[0\]: an answer has no tokens"):
        examples.encode([dict(prompt="w005", completion=" ")], words, VOCAB)
    with pytest.raises(ValueError, match=r"^examples\[0\]: .* must hold JSON values"):
        examples.encode([dict(prompt="w005", completion="w006", when={1, 2})], words, VOCAB)
    for bad, message in ((iter(rows), "must be a list"), ({}, "is empty"), ("a", "an object")):
        with pytest.raises(ValueError, match=message):
            examples.encode(bad, words, VOCAB)


def test_nothing_runs_before_all_examples_are_checked(tmp_path, words, monkeypatch):
    model = tiny_peft()
    engine = SteeredEngine(model, words, SteeringConfig(-1.0))
    monkeypatch.setattr(engine.pair, "prefill", lambda *_: pytest.fail("the model was run"))
    good = [dict(prompt=[5], completion=[6], rejected=[[7]])] * 4
    outside = dict(prompt=[5], completion=[VOCAB], rejected=[[7]])
    long = dict(prompt=[5] * 200, completion=[6], rejected=[[7]])
    for bad, message in ((outside, "has token ids from 211"), (long, "does not fit")):
        with pytest.raises(ValueError, match=rf"^examples\[4\].*{message}"):
            engine.calibrate([*good, bad])
    with pytest.raises(ValueError, match=r"^examples\[4\]: an answer has token ids from 211"):
        warm_start(tiny_base("llama"), words, [*good, outside], tmp_path / "a", progress=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="a continuation has token ids from 211"):
        engine.score([5], [[6], [VOCAB]])
