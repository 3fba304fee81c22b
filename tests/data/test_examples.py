"""Examples: what is read, how it is encoded, and which line is blamed."""

import pytest

from svd_engine.data import examples


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


GOOD = '{"prompt": "a", "completion": "b"}'
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


@pytest.mark.parametrize("line", BAD)
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
