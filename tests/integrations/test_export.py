"""The exported folder in transformers and in `transformers serve`, against plain two-pass loops."""

import gc
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import weakref
from pathlib import Path

import pytest
import torch
from peft import PromptTuningConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextStreamer

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.integrations import custom_generate
from svd_engine.steering_config import Steering
from tests.integrations.test_hugging_face import letters
from tests.tiny import PROMPTS, tiny_base, tiny_peft, two_pass

STEERING = SteeringConfig(-4.0, alpha=0.02)
NEW = 8


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """The tiny adapter with a strength."""
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    shutil.copytree(tiny_folder / "adapter", folder)
    Steering(STEERING, SteeringConfig(-9.0)).save_pretrained(folder)
    return folder


@pytest.fixture
def exported(run, trained, tiny_folder, tmp_path):
    folder = tmp_path / "bundle"
    code, out, err = run("export", folder, "--adapter", trained, "--base", tiny_folder / "base")
    assert code == 0 and f"transformers serve {folder}" in out, err
    return folder


def tokens(model, prompt, **options):
    """The new tokens of `generate`, greedy."""
    ids = torch.tensor([prompt])
    made = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options)
    return made[0, len(prompt) :].tolist()


def wanted(prompt, strength, alpha=0.02, model=None):
    return [token for token, _ in two_pass(model or tiny_peft(), prompt, NEW, strength, alpha)]


def test_a_model_of_the_folder_decodes_steered(exported):
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    different = set()
    for prompt in PROMPTS:
        assert tokens(model, prompt) == wanted(prompt, -4.0)
        assert tokens(model, prompt, strength=2.0, alpha=0.1) == wanted(prompt, 2.0, 0.1)
        different.add(wanted(prompt, -4.0) == wanted(prompt, 2.0, 0.1))
    assert False in different


def test_the_folder_is_a_custom_generate(exported):
    model = AutoModelForCausalLM.from_pretrained(exported)
    plain = tokens(model, PROMPTS[0])
    here = dict(custom_generate=str(exported), trust_remote_code=True)
    assert tokens(model, PROMPTS[0], **here) == wanted(PROMPTS[0], -4.0) != plain
    other = tiny_peft()  # with an adapter of its own, and no strength beside it
    with pytest.raises(ValueError, match="its strength is not known; load it from the folder or"):
        tokens(other, PROMPTS[0], **here)
    assert tokens(other, PROMPTS[0], strength=-3.0, **here) == wanted(PROMPTS[0], -3.0, 0.1)
    model = tiny_base("llama")
    model.name_or_path = str(exported / "adapter")
    with pytest.raises(ValueError, match="was not loaded from an exported folder: there is no"):
        tokens(model, PROMPTS[0], **here)


def test_streams_and_stop_strings(exported, words, capsys):
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    new = wanted(PROMPTS[0], -4.0)
    assert tokens(model, PROMPTS[0], streamer=TextStreamer(words, skip_prompt=True)) == new
    assert capsys.readouterr().out.split() == [f"w{token:03}" for token in new]
    tokenizer = letters()
    stop = [tokenizer.decode(new[2:4])]
    assert tokens(model, PROMPTS[0], stop_strings=stop, tokenizer=tokenizer) == new[:4]
    config = GenerationConfig(stop_strings=stop)
    stopped = tokens(model, PROMPTS[0], generation_config=config, tokenizer=tokenizer)
    assert stopped == new[:4] and config.stop_strings == stop


def test_prompt_tuning(run, tiny_folder, tmp_path):
    config = PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    trained = tiny_peft(config=config)
    trained.save_pretrained(tmp_path / "adapter")
    options = "--base", tiny_folder / "base", "--strength", -4, "--alpha", 0.02, "--copy"
    code, _, err = run("export", tmp_path / "bundle", "--adapter", tmp_path / "adapter", *options)
    assert code == 0, err
    assert not any(path.is_symlink() for path in (tmp_path / "bundle").rglob("*"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bundle", trust_remote_code=True)
    assert tokens(model, PROMPTS[0]) == wanted(PROMPTS[0], -4.0, model=trained)


def test_what_is_written(exported, trained, tiny_folder, run):
    link = exported / "model.safetensors"
    assert link.is_symlink() and link.resolve() == tiny_folder / "base" / "model.safetensors"
    assert Steering.from_pretrained(exported / "adapter") == Steering.from_pretrained(trained)
    engine = SteeredEngine.from_pretrained(exported, exported / "adapter")
    assert [c.token_ids for c in engine.generate(PROMPTS, max_new_tokens=NEW)] == [
        wanted(prompt, -4.0) for prompt in PROMPTS
    ]
    AutoTokenizer.from_pretrained(exported)
    code, _, err = run("export", exported, "--adapter", trained)
    assert code == 2 and "exists and is not an empty folder" in err
    assert not list(exported.parent.glob(".writing*"))


def test_refused_before_the_model_is_loaded(run, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("svd_engine.loading.load_base", lambda *_, **__: pytest.fail("loaded"))
    asked = "export", tmp_path / "x", "--adapter", tiny_folder / "adapter"
    code, _, err = run(*asked, "--for", "nothing")
    assert code == 2 and "--for must be transformers" in err
    code, _, err = run(*asked)
    assert code == 2 and "no steering_config.json with a strength for generation" in err
    assert not (tmp_path / "x").exists()


def test_models_are_released(exported):
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    tokens(model, PROMPTS[0])
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and not custom_generate._steerings


def test_transformers_serve(exported, words):
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package)
    openai = pytest.importorskip("openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cache = exported.parent / "hub"
    cache.mkdir()
    command = [
        sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve",
        exported, "--trust-remote-code", "--port", port, "--host", "127.0.0.1", "--device", "cpu",
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path[1:]])
    log = exported.parent / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=output, env=environment
        )
    try:
        answers(f"http://127.0.0.1:{port}/health", server, log)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        for prompt in PROMPTS:
            asked = dict(
                model=str(exported), prompt=words.decode(prompt), max_tokens=NEW, temperature=0
            )
            text = words.decode(wanted(prompt, -4.0), skip_special_tokens=True)
            assert client.completions.create(**asked).choices[0].text == text
            parts = client.completions.create(**asked, stream=True)
            assert "".join(p.choices[0].text for p in parts if p.choices).split() == text.split()
    finally:
        server.terminate()
        server.wait(30)


def answers(url, server, log):
    for _ in range(600):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            return urllib.request.urlopen(url, timeout=5)
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text()[-3000:])
