"""The folder of an unfinished warm start: killed at any moment, nothing is lost or half there."""

import json
import multiprocessing
import os
import random
import shutil

import pytest
from peft import PeftModel

from svd_engine.data import contamination
from svd_engine.training import checks, partial_folder, trainer, warm_start
from svd_engine.training.warm_start import warm_start as train
from tests.tiny import VOCAB, tiny_base

pytestmark = pytest.mark.slow


class Killed(BaseException):
    """What no cleaning up follows."""


def run(words, output, steps=4, **options):
    rng = random.Random(0)
    examples = [dict(prompt=[5, rng.randrange(3, VOCAB)], completion=[7, 8]) for _ in range(12)]
    return train(
        tiny_base("llama"), words, examples, output, steps=steps, batch_size=4,
        learning_rate=1e-2, checkpoint_every=1, progress=False, **options,
    )  # fmt: skip


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def curve(folder):
    return json.loads((folder / "warm_start.json").read_text())["losses"]


def kill(patch, owner, name, before=lambda *arguments: True):
    """Let the call of `name` end the process, as far as one process can show it."""
    original = getattr(owner, name)

    def killed(*arguments, **keywords):
        if before(*arguments):
            raise Killed
        return original(*arguments, **keywords)

    patch.setattr(owner, name, killed)
    patch.setattr(partial_folder.shutil, "rmtree", lambda *a, **k: None)  # nothing cleans up


# What comes after the last checkpoint, up to the rename that puts the adapter there.
LATE = {
    "before the adapter is written": (PeftModel, "save_pretrained"),
    "before the record of prompts": (contamination, "record"),
    "before the curve": (warm_start, "write_together"),
    "before the rename": (partial_folder, "publish"),
}


@pytest.mark.parametrize("moment", LATE)
def test_killed_after_the_last_checkpoint(moment, tmp_path, words, monkeypatch):
    owner, name = LATE[moment]
    whole = run(words, tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill(patch, owner, name)
        with pytest.raises(Killed):
            run(words, tmp_path / "a")
    steps = []
    step = trainer.AdapterTrainer.training_step
    monkeypatch.setattr(
        trainer.AdapterTrainer, "training_step", lambda *a: steps.append(1) or step(*a)
    )
    again = run(words, tmp_path / "a")
    assert not steps
    assert weights(again) == weights(whole) and curve(again) == curve(whole)
    assert [number for number, _ in curve(again)] == [1, 2, 3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "whole"]


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path, words, monkeypatch):
    output = tmp_path / "a"
    record = contamination.record

    def appears(*arguments):
        output.mkdir(exist_ok=True)
        (output / "precious").write_text("kept")
        return record(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(contamination, "record", appears)
        with pytest.raises(ValueError, match=r"a exists.* The new adapter is kept in .*partial"):
            run(words, output)
        with pytest.raises(ValueError, match="it is no adapter and is not overwritten"):
            run(words, output, overwrite=True)
    assert [p.name for p in output.iterdir()] == ["precious"]
    shutil.rmtree(output)
    assert weights(run(words, output)) == weights(run(words, tmp_path / "b"))


def test_a_file_that_appears_in_the_last_moment_is_not_replaced(tmp_path, words, monkeypatch):
    output, rename = tmp_path / "a", os.rename

    def late(source, target):
        (tmp_path / "a").write_text("kept")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(partial_folder.os, "rename", late)
        with pytest.raises(ValueError, match="The new adapter is kept"):
            run(words, output, steps=1)
    assert output.read_text() == "kept"


def test_killed_between_two_renames(tmp_path, words, monkeypatch):
    """The old adapter comes back, or the new one is there."""
    old = weights(run(words, tmp_path / "a", seed=1))
    renamed = []
    with monkeypatch.context() as patch:
        kill(patch, partial_folder.os, "rename", lambda *a: renamed.append(a) or len(renamed) > 1)
        kill(patch, partial_folder, "_restore", lambda replaced, output: len(renamed) >= 1)
        with pytest.raises(Killed):
            run(words, tmp_path / "a", overwrite=True)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="a exists"):  # other settings, and no overwriting
        with partial_folder.opened(tmp_path / "a", False):
            pass
    assert weights(tmp_path / "a") == old
    assert weights(run(words, tmp_path / "a", overwrite=True)) == weights(
        run(words, tmp_path / "b")
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_rename_that_fails_leaves_the_old_adapter(tmp_path, words, monkeypatch):
    old = weights(run(words, tmp_path / "a", steps=1))
    renamed, rename = [], os.rename

    def full(source, target):
        renamed.append(source)
        if len(renamed) == 2:
            raise OSError(28, "No space left on device", str(target))
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(partial_folder.os, "rename", full)
        with pytest.raises(ValueError, match=r"No space left on device.*is kept in"):
            run(words, tmp_path / "a", steps=2, overwrite=True)
    assert weights(tmp_path / "a") == old


@pytest.mark.parametrize("content", [{"notes.txt": "mine"}, {"config.json": "{}"}, None])
def test_overwrite_takes_adapters_alone(content, tmp_path, words):
    output = tmp_path / "a"
    if content is None:
        output.write_text("mine")
    else:
        output.mkdir()
        for name, text in content.items():
            (output / name).write_text(text)
    before = sorted((p.name, p.is_file() and p.read_text()) for p in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"no adapter_config\.json: it is no adapter"):
        run(words, output, overwrite=True)
    assert sorted((p.name, p.is_file() and p.read_text()) for p in tmp_path.rglob("*")) == before


def hold(output, ready, leave):
    with partial_folder.opened(output, False):
        ready.set()
        leave.wait(60)
        os._exit(9)  # as if killed


def test_a_second_run_into_one_folder_is_refused_at_once(tmp_path, words):
    context = multiprocessing.get_context("fork")
    ready, leave = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "a", ready, leave))
    other.start()
    assert ready.wait(60)
    with pytest.raises(ValueError, match=r"a: another run is writing it"):
        run(words, tmp_path / "a")
    assert (tmp_path / ".a.partial").is_dir()
    leave.set()
    other.join()
    assert [step for step, _ in curve(run(words, tmp_path / "a"))] == [1, 2, 3, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("path", [".", "..", "/", "a/.."])
def test_an_output_without_a_name_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="output must name a folder of its own"):
        checks.output(tmp_path.__class__(path), True)


def test_damaged_checkpoints_are_passed_over(tmp_path):
    state = json.dumps({"global_step": 1, "max_steps": 2, "log_history": []})
    for number, (name, text) in enumerate(
        (("x", state), ("", state), ("9" * 30, state), ("4", "5"), ("5", "{}"), ("6", "[" * 99999)),
    ):
        folder = tmp_path / f"checkpoint-{name}"
        folder.mkdir()
        (folder / trainer.STATE_FILE).write_text(text)
        (folder / trainer.WEIGHTS_FILE).write_bytes(b"5" * number)
    assert trainer.newest_checkpoint(tmp_path) is None
