"""Loading: bases, and the tokenizer beside an adapter where it fits the base."""

import json
import logging
import shutil

import pytest
import torch

from svd_engine import SteeredEngine, SteeringConfig, loading
from svd_engine.data.tokenization import encode_chat
from tests.data import forms
from tests.tiny import VOCAB

ASKED = [{"role": "user", "content": "w020"}]
OWN, BASE = "w030 {{ messages[0].content }} w031", "w040 {{ messages[0].content }} w041"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """Base and adapter in folders of one test."""
    for name in ("base", "adapter"):
        shutil.copytree(tiny_folder / name, tmp_path / name)
    (tmp_path / "base" / "chat_template.jinja").write_text(BASE)
    return tmp_path


def load(folder, caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="svd_engine.loading"):
        engine = SteeredEngine.from_pretrained(folder / "base", folder / "adapter")
    engine.steering = SteeringConfig(-1.0)
    return engine, caplog.messages


def test_without_one_it_is_the_bases_and_nothing_is_said(folder, caplog):
    engine, said = load(folder, caplog)
    assert said == [] and encode_chat(ASKED, engine.tokenizer) == [40, 20, 41]


def test_a_chat_template_alone_goes_with_the_bases_tokenizer(folder, caplog):
    (folder / "adapter" / "chat_template.jinja").write_text(OWN)
    engine, (said,) = load(folder, caplog)
    assert said.startswith("The chat template beside the adapter is used")
    (got,) = engine.generate(messages=ASKED, max_new_tokens=2)
    (truth,) = engine.generate([[30, 20, 31]], max_new_tokens=2)
    assert got.token_ids == truth.token_ids and got.prompt_tokens == 3


def test_a_template_that_is_no_text_is_named(folder, caplog):
    (folder / "adapter" / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template.jinja is not UTF-8: invalid start byte"):
        load(folder, caplog)


def test_a_tokenizer_that_fits_is_used(folder, caplog, words):
    """Another template, beginning-of-sequence and end-of-sequence token than the base's."""
    own = loading.AutoTokenizer.from_pretrained(folder / "base")
    own.chat_template, own.eos_token = OWN, "w009"
    own.save_pretrained(folder / "adapter")
    engine, (said,) = load(folder, caplog)
    assert said.startswith("The tokenizer and chat template beside the adapter are used")
    assert str(folder / "adapter") in said
    assert engine.tokenizer.eos_token_id == 9 and words.eos_token_id == 2
    assert encode_chat(ASKED, engine.tokenizer) == [30, 20, 31]
    own.chat_template = None
    (folder / "adapter" / "chat_template.jinja").unlink()
    own.save_pretrained(folder / "adapter")
    engine, (said,) = load(folder, caplog)
    assert said.startswith("The tokenizer beside the adapter is used")
    assert encode_chat(ASKED, engine.tokenizer) == [40, 20, 41]


def test_a_renamed_added_token_fits(folder, caplog):
    """As reserved tokens are renamed for a chat format: the id stays."""
    own = loading.AutoTokenizer.from_pretrained(folder / "base")
    text = own.backend_tokenizer.to_str().replace('"w002"', '"<|im_end|>"')
    own = loading.AutoTokenizer.from_pretrained(folder / "base")
    own._tokenizer = type(own.backend_tokenizer).from_str(text)
    own.eos_token = "<|im_end|>"
    own.save_pretrained(folder / "adapter")
    engine, (said,) = load(folder, caplog)
    assert "are used" in said and engine.tokenizer("w005<|im_end|>").input_ids == [5, 2]


def test_one_that_does_not_fit_is_left_aside_with_the_reason(folder, caplog):
    def reason(tokenizer):
        tokenizer.save_pretrained(folder / "adapter")
        engine, (said,) = load(folder, caplog)
        assert encode_chat(ASKED, engine.tokenizer) == [40, 20, 41]
        assert said.startswith("The tokenizer beside the adapter is not used")
        assert said.endswith("The base's is.")
        return said

    more = loading.AutoTokenizer.from_pretrained(folder / "base")
    more.add_tokens(["new"])
    assert f"token ids up to {VOCAB}, and the model a vocabulary of {VOCAB}" in reason(more)
    assert "its token 'w003' is missing, and 3 in the base's" in reason(forms.build("llama2"))
    assert "is missing, and" in reason(forms.build("word-level"))
    (folder / "adapter" / "tokenizer.json").write_text("{")
    _, (said,) = load(folder, caplog)
    assert "it cannot be loaded: " in said


def test_the_commands_use_it_too(folder, caplog, run):
    (folder / "adapter" / "chat_template.jinja").write_text(OWN)
    at = ["--base", folder / "base"]
    options = [*at, "--adapter", folder / "adapter", "--strength", -1, "--max-new-tokens", 3]
    code, out, _ = run("generate", "w020", "--chat", *options)
    assert code == 0 and out == run("generate", "w030 w020 w031", *options)[1]
    caplog.clear()
    asked = [
        dict(messages=[*ASKED, dict(role="assistant", content=f"w0{i}")]) for i in range(50, 56)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in asked))
    code, _, _ = run("calibrate", folder / "adapter", data, *at, "--folds", 2)
    assert code == 0
    assert caplog.messages == [
        f"The chat template beside the adapter is used ({folder / 'adapter'})."
    ]


def test_files_that_are_not_loaded_may_be_damaged(tiny_folder, tmp_path):
    """A checkpoint in another format lies beside this one, fetched in part."""
    base = shutil.copytree(tiny_folder / "base", tmp_path / "base")
    (base / "consolidated.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    loading.load_base(base)
    (base / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"base/model.safetensors is damaged"):
        loading.load_base(base)


@pytest.mark.parametrize("has_products", [True, False])
def test_smollm2_is_float32_on_a_cpu_without_bfloat16_products(monkeypatch, has_products):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_products)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_products)
    dtype = torch.bfloat16 if has_products else torch.float32
    assert loading._fast_dtype("cpu") == dtype
    assert loading._fast_dtype("cuda:0") == torch.bfloat16
