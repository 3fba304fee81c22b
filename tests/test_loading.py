"""Loading: bases, and the tokenizer beside an adapter where it fits the base."""

import json
import logging
import shutil

import pytest
import torch

from svd_engine import SteeredEngine, SteeringConfig, hub, loading
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


# names


def name_base(folder, name, file="adapter_config.json", key="base_model_name_or_path"):
    path = folder / "adapter" / file
    values = json.loads(path.read_text()) if path.is_file() else {"strength": -1.0}
    path.write_text(json.dumps(values | {key: None if name is None else str(name)}))


def test_the_base_is_the_one_that_the_adapter_names(folder, caplog, run):
    given = SteeredEngine.from_pretrained(folder / "base", folder / "adapter")
    truth = given.generate([[5, 17]], max_new_tokens=4)
    with pytest.raises(ValueError, match=r"adapter' does not name its base; give base \(--base\)"):
        SteeredEngine.from_pretrained(folder / "adapter")
    with pytest.raises(ValueError, match="give the folder or the Hub name of an adapter"):
        SteeredEngine.from_pretrained()
    steering = dict(file="steering_config.json", key="base_model")
    name_base(folder, folder / "base", **steering)
    for calls in ("its steering file", "its configuration, which wins"):
        engine = SteeredEngine.from_pretrained(folder / "adapter")
        assert engine.generate([[5, 17]], model="adapted", max_new_tokens=4) == truth, calls
        assert engine.steering.generation.strength == -1.0
        name_base(folder, folder / "base")
        name_base(folder, "elsewhere/other", **steering)
    assert SteeredEngine.from_pretrained(adapter=str(folder / "adapter")).steering is not None
    adapter = ["--adapter", folder / "adapter", "--max-new-tokens", 3]
    code, out, _ = run("generate", "w005", *adapter)
    assert code == 0 and out == run("generate", "w005", *adapter, "--base", folder / "base")[1]
    assert caplog.messages == []


def test_another_base_than_the_named_one_is_said(folder, caplog):
    name_base(folder, "owner/Base")
    load(folder, caplog)  # whose folder has the same name
    assert caplog.messages == []
    name_base(folder, "owner/other")
    assert load(folder, caplog)[1] == [
        f"The adapter names the base owner/other; {folder / 'base'} is used ({folder / 'adapter'})."
    ]
    name_base(folder, folder / "gone")
    with pytest.raises(
        ValueError,
        match=r"gone' cannot be loaded: there is no such folder. .*adapt"
        r"er names it; give another as base",
    ):
        SteeredEngine.from_pretrained(folder / "adapter")


def test_what_looks_like_a_path_is_not_sought_on_the_hub(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for name in ("snapshot_download", "HfApi"):
        monkeypatch.setattr(hub, name, lambda *_, **__: pytest.fail("the Hub was asked"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.snapshot_download)
    away = ["/no/such", "./no", "../no", "~/no", "a/b/c", "base/no", "no/", str(folder / "no")]
    for name in (*away, "no", "adapter/no"):
        with pytest.raises(ValueError, match="does not exist"):
            SteeredEngine.from_pretrained("base", name)
        with pytest.raises(ValueError, match="does not exist"):
            SteeringConfig.from_pretrained(name)
    for name in away:
        with pytest.raises(ValueError, match="there is no such folder"):
            SteeredEngine.from_pretrained(name, "adapter")


def test_hub_names_without_the_hub(folder, monkeypatch):
    """They come from the cache, steering included; what is not there is said at once."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    (truth,) = SteeredEngine.from_pretrained(folder / "base", folder / "adapter").generate(
        [[5, 7]], max_new_tokens=4
    )
    SteeringConfig(-3.0).save_pretrained(folder / "adapter")
    name_base(folder, "owner/base")
    for name in ("base", "adapter"):
        kept = folder / "cache" / f"models--owner--{name}"
        (kept / "refs").mkdir(parents=True)
        (kept / "refs" / "main").write_text("a" * 40)
        shutil.copytree(folder / name, kept / "snapshots" / ("a" * 40))
    engine = SteeredEngine.from_pretrained("owner/adapter")
    assert engine.generate([[5, 7]], model="adapted", max_new_tokens=4) == [truth]
    assert engine.steering.generation.strength == -3.0
    assert SteeringConfig.from_pretrained("owner/adapter").strength == -3.0
    with pytest.raises(ValueError, match=r"adapter 'owner/no' does not exist: .* the Hub does not"):
        SteeredEngine.from_pretrained("owner/no")
    for base in ("owner/no", "no"):
        with pytest.raises(
            ValueError, match=f"base '{base}' cannot be loaded: it is not here, and"
        ):
            SteeredEngine.from_pretrained(base, "owner/adapter")
