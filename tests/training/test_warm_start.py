"""The warm start trains a real adapter, whole or not at all, and goes on where it was stopped."""

import json
import math
import random

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import Trainer

from svd_engine import loading
from svd_engine.data import contamination
from svd_engine.training import trainer
from svd_engine.training.checks import RATES
from svd_engine.training.warm_start import PAPER_RATE, warm_start
from svd_engine.utils import plots
from tests.tiny import VOCAB, tiny_base

pytestmark = pytest.mark.slow


def examples(n=24):
    rng = random.Random(0)
    return [dict(prompt=[5, rng.randrange(3, VOCAB)], completion=[7, 8, 9]) for _ in range(n)]


def loss(model):
    ids = torch.tensor([[5, 100, 7, 8, 9, 2]])
    labels = torch.tensor([[-100, -100, 7, 8, 9, 2]])
    with torch.no_grad():
        return float(model(ids, labels=labels).loss)


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def curve(folder):
    return json.loads((folder / "warm_start.json").read_text())["losses"]


@pytest.mark.parametrize("method", RATES)
def test_every_method_learns_and_loads(method, tmp_path, words):
    base = tiny_base("llama")
    before = {name: p.clone() for name, p in base.named_parameters()}
    folder = warm_start(
        base, words, examples(), tmp_path / "adapter", method=method, steps=30, batch_size=8,
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
    assert loss(loading.load_adapter(plain, folder)) < start - 0.5


def test_a_bfloat16_base_gets_a_float32_adapter(tmp_path, words):
    base = tiny_base("llama").to(torch.bfloat16)
    folder = warm_start(base, words, examples(), tmp_path / "a", steps=1, progress=False)
    adapter = PeftModel.from_pretrained(tiny_base("llama"), str(folder)).state_dict()
    assert {v.dtype for k, v in adapter.items() if "lora" in k} == {torch.float32}


def test_same_seed_same_adapter(tmp_path, words):
    one, two = (
        warm_start(tiny_base("llama"), words, examples(), tmp_path / n, steps=3, progress=False)
        for n in "ab"
    )
    assert weights(one) == weights(two) and curve(one) == curve(two)


def test_the_papers_settings_are_the_defaults(tmp_path, words):
    folder = warm_start(tiny_base("llama"), words, examples(40), tmp_path / "a", progress=False)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.1)
    saved = json.loads((folder / "warm_start.json").read_text())
    settings = saved["settings"]
    assert settings["learning_rate"] == PAPER_RATE == 5e-5 and settings["max_length"] == 512
    assert settings["virtual_tokens"] == 20
    assert [step for step, _ in saved["losses"]] == [1, 2, 3]  # one epoch of 40 examples by 16


@pytest.mark.parametrize("method", ["prompt", "p-tuning", "prefix"])
def test_virtual_tokens_and_the_rate_that_suits_the_method(method, tmp_path, words):
    folder = warm_start(
        tiny_base("llama"), words, examples(), tmp_path / "a", method=method, virtual_tokens=5,
        steps=1, learning_rate="auto", progress=False,
    )  # fmt: skip
    assert json.loads((folder / "adapter_config.json").read_text())["num_virtual_tokens"] == 5
    settings = json.loads((folder / "warm_start.json").read_text())["settings"]
    assert settings["learning_rate"] == RATES[method]


@pytest.mark.parametrize("steps, rate", [(1, RATES["lora"]), (3, PAPER_RATE)])
def test_a_short_run_takes_the_rate_of_short_runs(steps, rate, tmp_path, words, monkeypatch):
    monkeypatch.setattr("svd_engine.training.warm_start.SHORT", 2)
    folder = warm_start(
        tiny_base("llama"), words, examples(), tmp_path / "adapter", rank=1, steps=steps,
        batch_size=4, learning_rate=None, progress=False,
    )  # fmt: skip
    settings = json.loads((folder / "warm_start.json").read_text())["settings"]
    assert settings["learning_rate"] == rate


@pytest.mark.parametrize(
    "values, told", [([3, 1, 2, 1], False), ([1, 3, 1, 1], True), ([1], False)]
)
def test_a_loss_that_does_not_fall_is_told(values, told, tmp_path, words, caplog, monkeypatch):
    losses = list(enumerate(map(float, values), 1))
    monkeypatch.setattr("svd_engine.training.trainer.train", lambda *_, **__: losses)
    warm_start(tiny_base("llama"), words, examples(), tmp_path / "adapter")
    assert ("The loss did not fall: 1.000 at first, 1.000 at last" in caplog.text) is told


def test_a_loss_that_is_not_finite_leaves_nothing(tmp_path, words):
    base = tiny_base("llama")
    base.lm_head.weight.data[7] = math.inf
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step 1: nothing is written"):
        warm_start(
            base, words, examples(), tmp_path / "adapter", steps=2, batch_size=4, progress=False,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_accumulated_batches_are_one_batch(tmp_path, words):
    """IA3 has no dropout; sequences of several lengths show that tokens weigh alike."""
    mixed = [dict(prompt=[5, 6 + i], completion=[7, 8, 9, 10][: 1 + i % 4]) for i in range(16)]
    one, two = (
        warm_start(
            tiny_base("llama"), words, mixed, tmp_path / str(size), method="ia3", steps=4,
            batch_size=size, accumulation=8 // size, learning_rate=1e-2, progress=False,
        )
        for size in (8, 2)
    )  # fmt: skip
    assert dict(curve(two)) == pytest.approx(dict(curve(one)), rel=1e-3)


class Killed(BaseException):
    """What no cleaning up follows."""


@pytest.mark.parametrize("method", RATES)
def test_a_killed_run_goes_on_to_the_same_adapter(method, tmp_path, words, monkeypatch):
    def run(name, checkpoint_every=2, **options):
        return warm_start(
            tiny_base("llama"), words, examples(), tmp_path / name, method=method, steps=7,
            batch_size=4, learning_rate=1e-2, checkpoint_every=checkpoint_every, progress=False,
            **options,
        )  # fmt: skip

    whole = run("whole", checkpoint_every=20)
    step, done = trainer.AdapterTrainer.training_step, []

    def killing(self, *arguments):
        done.append(self.state.global_step)
        if len(done) == 6:
            raise Killed
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.AdapterTrainer, "training_step", killing)
        with pytest.raises(Killed):
            run("killed")
        # A checkpoint whose writing was cut short is passed over.
        torn = tmp_path / ".killed.partial" / "checkpoint-5"
        torn.mkdir()
        (torn / "trainer_state.json").write_text('{"epoch"')
        done[:] = [0] * 6
        again = run("killed")
    assert done[6:] == [4, 5, 6]
    assert weights(again) == weights(whole) and curve(again) == curve(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]


def test_another_call_does_not_go_on_from_a_killed_one(tmp_path, words, monkeypatch):
    def run(**options):
        return warm_start(
            tiny_base("llama"), words, examples(), tmp_path / "a", steps=3, batch_size=4,
            checkpoint_every=1, progress=False, **options,
        )  # fmt: skip

    with monkeypatch.context() as patch:
        patch.setattr(
            trainer.AdapterTrainer, "log", lambda self, logs, *a: 1 / (self.state.global_step < 2)
        )
        with pytest.raises(ZeroDivisionError):
            run()
    assert (tmp_path / ".a.partial" / "checkpoint-1").is_dir()
    folder = run(seed=1)
    assert [step for step, _ in curve(folder)] == [1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_folder_tells_what_was_trained_on(tmp_path, words, monkeypatch):
    folder = warm_start(
        tiny_base("llama"), words, examples(), tmp_path / "a", steps=2, progress=False
    )
    with pytest.raises(ValueError, match="seen in training"):
        contamination.check(folder, contamination.prompts(examples()), against=("training",))
    assert len(curve(folder)) == 2
    pytest.importorskip("matplotlib")
    assert (folder / "warm_start.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert plots.training([(1, 1.0)]) is None


def test_the_loss_looks_at_the_answers_alone(words):
    first, second = trainer.labelled(
        [dict(prompt=[5, 6], completion=[7], accepted=[[8, 9]])], words, 10
    )
    assert first == {"input_ids": [5, 6, 7, 2], "labels": [-100, -100, 7, 2]}
    assert second == {"input_ids": [5, 6, 8, 9, 2], "labels": [-100, -100, 8, 9, 2]}


def test_an_interrupt_leaves_nothing_behind(tmp_path, words, monkeypatch):
    def interrupted(self, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        warm_start(tiny_base("llama"), words, examples(), tmp_path / "adapter", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_overwrite_keeps_the_old_adapter_until_the_new_one_is_there(tmp_path, words, monkeypatch):
    folder = warm_start(
        tiny_base("llama"), words, examples(), tmp_path / "a", steps=1, progress=False
    )
    old = weights(folder)
    with pytest.raises(ValueError, match="exists"):
        warm_start(tiny_base("llama"), words, examples(), folder, steps=1, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", lambda self, **_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            warm_start(
                tiny_base("llama"), words, examples(), folder, overwrite=True, progress=False
            )
    assert weights(folder) == old
    warm_start(
        tiny_base("llama"),
        words,
        examples(),
        folder,
        steps=2,
        overwrite=True,
        progress=False,
        seed=1,
    )
    assert weights(folder) != old


BAD = {
    "method must be one of lora, ia3": dict(method="qlora"),
    "steps must be an integer from 1": dict(steps=0),
    "epochs must be above 0": dict(epochs=-1.0),
    "epochs must be above 0 and finite; got nan": dict(epochs=math.nan),
    "epochs must be above 0 and finite; got inf": dict(epochs=math.inf),
    "lora_alpha must be above 0 and finite; got nan": dict(lora_alpha=math.nan),
    "lora_alpha must be above 0 and finite; got inf": dict(lora_alpha=math.inf),
    "learning_rate must be above 0 and finite, or 'auto'; got nan": dict(learning_rate=math.nan),
    "learning_rate must be above 0 and finite, or 'auto'; got inf": dict(learning_rate=math.inf),
    r"dropout must lie in \[0, 1\); got nan": dict(dropout=math.nan),
    "seed must be an integer from 0": dict(seed=-1),
    "steps must be an integer from 1 .* got 1.5": dict(steps=1.5),
    "batch_size must be an integer from 1": dict(batch_size=0),
    "max_length is 3": dict(max_length=3),
    "rank must be an integer from 1": dict(rank=0),
    "virtual_tokens must be an integer from 1": dict(virtual_tokens=0),
    "accumulation must be an integer from 1": dict(accumulation=0),
    "checkpoint_every must be an integer from 1": dict(checkpoint_every=0),
    r"dropout must lie in \[0, 1\)": dict(dropout=1.0),
    "learning_rate must be above 0 and finite, or 'auto'; got 'fast'": dict(learning_rate="fast"),
    "learning_rate must be": dict(learning_rate=0.0),
    "learning_rate must be above 0 and finite, or 'auto'; got True": dict(learning_rate=True),
    "rank must be an integer from 1 to 65536; got True": dict(rank=True),
    "steps must be an integer from 1 .* got True": dict(steps=True),
    "rank must be a Python integer; got": dict(rank=np.int64(4)),
    "seed must be an integer from 0 .* got None": dict(seed=None),
    "lora_alpha must be above 0 and finite; got 'x'": dict(lora_alpha="x"),
    "epochs must be above 0 and finite; got True": dict(epochs=True),
    r"dropout must lie in \[0, 1\); got '0'": dict(dropout="0"),
}


@pytest.mark.parametrize("message", BAD)
def test_refusals(message, tmp_path, words):
    with pytest.raises(ValueError, match=message):
        warm_start(tiny_base("llama"), words, examples(), tmp_path / "adapter", **BAD[message])
    assert list(tmp_path.iterdir()) == []


def test_names_in_the_place_of_models_are_refused(tmp_path, words):
    for model, tokenizer, name in (("smollm2", words, "model"), (tiny_base("llama"), "x", "token")):
        with pytest.raises(ValueError, match=f"{name}.* must be one of transformers; got '"):
            warm_start(model, tokenizer, examples(), tmp_path / "adapter")
