"""Loading: code that comes with a checkpoint runs only where it is asked for."""

import json
import shutil

import pytest

from svd_engine import SteeredEngine, loading

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own(tiny_folder, tmp_path, monkeypatch):
    """A base whose classes are in its folder; they leave `ran` behind when they are imported."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    folder = tmp_path / "base"
    shutil.copytree(tiny_folder / "base", folder)
    (folder / "own.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_remote_code_is_refused(own, tiny_folder):
    for load in (
        lambda: loading.load_base(own),
        lambda: SteeredEngine.from_pretrained(own, tiny_folder / "adapter"),
    ):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load()
    assert not (own.parent / "ran").exists()


def test_remote_code_runs_where_it_is_asked_for(own, tiny_folder):
    engine = SteeredEngine.from_pretrained(own, tiny_folder / "adapter", trust_remote_code=True)
    assert (own.parent / "ran").exists()
    plain = SteeredEngine.from_pretrained(tiny_folder / "base", tiny_folder / "adapter")
    for model in ("base", "adapted"):
        got, wanted = (
            e.generate([[5, 17, 40]], model=model, max_new_tokens=6)[0].token_ids
            for e in (engine, plain)
        )
        assert got == wanted


def test_the_option(own, tiny_folder, run):
    options = ["--adapter", tiny_folder / "adapter", "--base", own, "--strength", 1]
    code, _, err = run("generate", "w005", "--max-new-tokens", 2, *options)
    assert code == 2 and "trust_remote_code" in err and len(err.splitlines()) == 1
    code, out, _ = run("generate", "w005", "--max-new-tokens", 2, *options, "--trust-remote-code")
    assert code == 0 and out.startswith("w")


@pytest.mark.parametrize("device", ["cuda", "meta", "foo", "cpu:x"])
def test_devices(tiny_folder, device):
    with pytest.raises(ValueError, match=f"device '{device}' is not available: .*[^.]\\. Give cpu"):
        loading.load_base(tiny_folder / "base", device=device)


@pytest.mark.parametrize("dtype", ["float8", "int8", "", "nn"])
def test_dtypes(tiny_folder, dtype):
    with pytest.raises(ValueError, match="dtype must be auto or one of"):
        loading.load_base(tiny_folder / "base", dtype=dtype)
