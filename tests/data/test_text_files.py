"""Lines end at \\n or \\r\\n alone, and a byte order mark is no text."""

import io
import json
import sys

import pytest

from svd_engine import SteeringConfig
from svd_engine.cli import generate
from svd_engine.data import examples
from svd_engine.data.text_files import lines, read_lines
from svd_engine.evaluate import journal, sources

# at which str.splitlines, or reading with universal newlines, also breaks a line
INSIDE = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_newlines_alone(tmp_path, mark, end):
    rows = [dict(prompt=INSIDE, completion=f"{i} {INSIDE}") for i in range(3)]
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    path = tmp_path / "data.jsonl"
    path.write_bytes((mark + end.join([*texts, ""])).encode())
    # \v, \f and the separators are escaped by JSON; what is not stands in the file as it is
    assert "\u2028" in texts[0] and "\x85" in texts[0]
    assert examples.read(path) == rows
    assert [item for _, item in sources.read_json(path)] == rows
    if not mark:  # nobody but the program writes a journal
        assert journal.whole_lines(path) == rows
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes((mark + end.join([INSIDE, "", f"lone\rreturn {INSIDE}"])).encode())
    assert generate._prompts(None, prompts, False) == [INSIDE, f"lone\rreturn {INSIDE}"]


def test_prompts_from_standard_input_are_lines_too(monkeypatch):
    typed = io.TextIOWrapper(io.BytesIO(f"\ufeff{INSIDE}\r\nWhy?\n".encode()))
    monkeypatch.setattr(sys, "stdin", typed)
    assert generate._prompts(None, None, False) == [INSIDE, "Why?"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Why?\n\xff\n")))
    with pytest.raises(ValueError, match=r"^standard input:2: not UTF-8: invalid start byte"):
        generate._prompts(None, None, False)


def test_files_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xe4"}\n')
    with pytest.raises(ValueError, match=rf"^{path}:2: not UTF-8: invalid continuation byte"):
        examples.read(path)
    with pytest.raises(ValueError, match=r"cannot be read: Is a directory"):
        read_lines(tmp_path)
    assert lines(b"", "nothing") == [""]


def test_a_steering_saved_with_a_mark_is_read(tmp_path):
    steering = SteeringConfig(-2.0, alpha=0.2)
    path = steering.save_pretrained(tmp_path)
    path.write_text("\ufeff" + path.read_text("utf-8"), "utf-8")
    assert SteeringConfig.from_pretrained(tmp_path) == steering
