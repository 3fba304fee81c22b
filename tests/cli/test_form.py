"""`generate --regex` and `--json-schema`: texts of the form, and errors before the model loads."""

import json

import pytest

from svd_engine import loading
from svd_engine.generation import text_form

pytest.importorskip("llguidance", reason='pip install "svd-engine[grammar]"')


@pytest.fixture
def command(run, tiny_folder, letters, tmp_path):
    for part in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / "base").mkdir(exist_ok=True)
        (tmp_path / "base" / part).symlink_to(tiny_folder / "base" / part)
    letters.save_pretrained(tmp_path / "base")

    def call(*more):
        return run(
            "generate", "--adapter", tiny_folder / "adapter", "--base", tmp_path / "base",
            "--strength", -2, "--max-new-tokens", 20, *more,
        )  # fmt: skip

    return call


def test_texts_have_the_form(command, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"enum": ["x", 12]}))
    assert command("yes?", "--regex", "(no|maybe)!")[1].strip() in ("no!", "maybe!")
    code, out, _ = command("yes?", "--json-schema", schema, "--json")
    assert code == 0 and json.loads(json.loads(out)["text"]) in ("x", 12)
    lines = [{"prompt": "yes"}, {"prompt": "yes", "json_schema": {"type": "boolean"}}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"
    assert command(*files, "--regex", "(no|maybe)!")[0] == 0
    answers = (tmp_path / "out.jsonl").read_text().splitlines()
    first, second = [json.loads(answer)["completions"][0]["text"] for answer in answers]
    assert first in ("no!", "maybe!") and second in ("true", "false")


def test_bad_forms_are_refused_before_the_model_is_loaded(command, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_base", lambda *_, **__: pytest.fail("it was loaded"))
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "in.jsonl").write_text('{"prompt": "yes", "regex": "(a"}')
    (tmp_path / "bad.json").write_text('{"type": "objec"}')
    files = "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"
    cases = [
        (("p", "--regex", "(a"), "regex cannot be used: unclosed group."),
        (("p", "--json-schema", tmp_path / "no.json"), "No such file"),
        (("p", "--json-schema", tmp_path / "list.json"), "list.json is not a JSON schema"),
        (("p", "--json-schema", tmp_path / "bad.json"), "Invalid type: objec"),
        (("p", "--regex", "a", "--json-schema", tmp_path / "bad.json"), "give one of them"),
        (files, "in.jsonl:1: regex cannot be used"),
    ]
    for options, message in cases:
        code, _, err = command(*options)
        assert code == 2 and message in err and err.count("\n") == 1
    monkeypatch.setattr(text_form, "find_spec", lambda _: None)
    code, _, err = command("p", "--regex", "a")
    assert code == 2 and "pip install 'svd-engine[grammar]'" in err and err.count("\n") == 1
