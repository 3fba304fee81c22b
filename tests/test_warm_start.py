"""The warm start trains a real adapter, whole or not at all."""

import random

import pytest
import torch
from conftest import VOCAB, tiny_base
from peft import PeftModel
from transformers import Trainer

from svd_engine import models
from svd_engine.warm_start import METHODS, _training_rows, warm_start


def rows(n=24):
    rng = random.Random(0)
    return [dict(prompt=[5, rng.randrange(3, VOCAB)], completion=[7, 8, 9]) for _ in range(n)]


def loss(model):
    ids = torch.tensor([[5, 100, 7, 8, 9, 2]])
    labels = torch.tensor([[-100, -100, 7, 8, 9, 2]])
    with torch.no_grad():
        return float(model(ids, labels=labels).loss)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_loads(method, tmp_path, words):
    base = tiny_base("llama")
    before = {name: p.clone() for name, p in base.named_parameters()}
    folder = warm_start(
        base, words, rows(), tmp_path / "adapter", method=method, steps=30, batch_size=8,
        learning_rate=2e-2, progress=False,
    )  # fmt: skip
    assert {p.name for p in folder.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    plain = tiny_base("llama")
    assert {n: p.shape for n, p in base.named_parameters()} == {
        n: p.shape for n, p in before.items()
    }
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, before[name]), f"{name} changed"
    start = loss(plain)
    assert loss(models.load_adapter(plain, folder)) < start - 0.5


def test_a_bfloat16_base_gets_a_float32_adapter(tmp_path, words):
    base = tiny_base("llama").to(torch.bfloat16)
    folder = warm_start(base, words, rows(), tmp_path / "a", steps=1, progress=False)
    adapter = PeftModel.from_pretrained(tiny_base("llama"), str(folder)).state_dict()
    assert {v.dtype for k, v in adapter.items() if "lora" in k} == {torch.float32}


def test_same_seed_same_adapter(tmp_path, words):
    one, two = (
        warm_start(tiny_base("llama"), words, rows(), tmp_path / n, steps=3, progress=False)
        for n in "ab"
    )
    files = [(folder / "adapter_model.safetensors").read_bytes() for folder in (one, two)]
    assert files[0] == files[1]


def test_the_loss_looks_at_the_answers_alone(words):
    row, other = _training_rows([dict(prompt=[5, 6], completion=[7], accepted=[[8, 9]])], words, 10)
    assert row == {"input_ids": [5, 6, 7, 2], "labels": [-100, -100, 7, 2]}
    assert other == {"input_ids": [5, 6, 8, 9, 2], "labels": [-100, -100, 8, 9, 2]}


def test_an_interrupt_leaves_nothing_behind(tmp_path, words, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        warm_start(tiny_base("llama"), words, rows(), tmp_path / "adapter", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_overwrite_keeps_the_old_adapter_until_the_new_one_is_there(tmp_path, words, monkeypatch):
    folder = warm_start(tiny_base("llama"), words, rows(), tmp_path / "a", steps=1, progress=False)
    old = (folder / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="exists"):
        warm_start(tiny_base("llama"), words, rows(), folder, steps=1, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            warm_start(tiny_base("llama"), words, rows(), folder, overwrite=True, progress=False)
    assert (folder / "adapter_model.safetensors").read_bytes() == old
    warm_start(
        tiny_base("llama"), words, rows(), folder, steps=2, overwrite=True, progress=False, seed=1
    )
    assert (folder / "adapter_model.safetensors").read_bytes() != old


BAD = {
    "method must be one of lora, ia3": dict(method="qlora"),
    "steps must be above 0": dict(steps=0),
    "epochs must be above 0": dict(epochs=-1.0),
    "batch_size must be above 0": dict(batch_size=0),
    "max_length is 3": dict(max_length=3),
}


@pytest.mark.parametrize("message", BAD)
def test_refusals(message, tmp_path, words):
    with pytest.raises(ValueError, match=message):
        warm_start(tiny_base("llama"), words, rows(), tmp_path / "adapter", **BAD[message])
    assert list(tmp_path.iterdir()) == []
