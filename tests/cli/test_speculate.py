"""`svd-engine generate --speculate`: the same texts, and errors of one line."""

import copy
import json

import pytest

from svd_engine import loading
from svd_engine.ops import cpu
from tests.tiny import tiny_base

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="no native kernels")


@pytest.fixture
def command(run, tiny_folder):
    def call(*more):
        return run(
            "generate", "--adapter", tiny_folder / "adapter", "--base", tiny_folder / "base",
            "--strength", -2, "--max-new-tokens", 9, "--dtype", "float32", *more,
        )  # fmt: skip

    return call


def test_texts_are_the_same(command, tiny_folder):
    code, want, _ = command("w005 w021 w005 w021")
    assert code == 0
    base = tiny_folder / "base"
    for sources in (["prompt"], [base], ["prompt", base, 3]):
        given = [x for source in sources for x in ("--speculate", source)]
        assert command("w005 w021 w005 w021", *given)[:2] == (0, want)


def test_answers_written_without_guesses_are_not_written_again(command, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps(dict(prompt="w005 w021 w005")) + "\n")
    files = "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"
    assert "1 of them new" in command(*files)[1]
    assert "0 of them new" in command(*files, "--speculate", "prompt")[1]


def test_errors_name_the_source(command, tmp_path, words):
    words = copy.deepcopy(words)
    code, _, err = command("w005", "--speculate", tmp_path / "missing")
    assert code == 2 and err.count("\n") == 1 and "no such folder" in err and "--speculate" in err
    tiny_base("llama").save_pretrained(tmp_path / "other")
    words.add_tokens(["w999"])
    words.save_pretrained(tmp_path / "other")
    code, _, err = command("w005", "--speculate", tmp_path / "other")
    assert code == 2 and "vocabulary is another one" in err
    code, _, err = command("w005", "--speculate", "prompt", "--beams", 2)
    assert code == 2 and "num_beams = 2 keeps several" in err


@pytest.mark.parametrize(
    "source, message",
    [("0", "the number of guesses must be an integer from 1"), ("-1", "got -1.0"),
     ("2.5", "got 2.5"), ("1e3", "got 1000.0"), (str(2**31), "got 2147483648"),
     ("./missing", "no such folder")],
)  # fmt: skip
def test_bad_sources_are_refused_before_the_model_is_loaded(command, monkeypatch, source, message):
    monkeypatch.setattr(loading, "load_base", lambda *_, **__: pytest.fail("it was loaded"))
    code, _, err = command("w005", f"--speculate={source}")
    assert code == 2 and err.count("\n") == 1 and message in err and f"--speculate {source}" in err
