"""A disk on which nothing can be written: one line that names the file, and nothing changed."""

import errno
import json
import resource
import shutil
from contextlib import contextmanager

import pytest

from svd_engine import SteeringConfig
from svd_engine.utils import files, plots
from tests.cli.test_main import EXAMPLES, write

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tiny_folder, tmp_path, monkeypatch):
    shutil.copytree(tiny_folder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    write(tmp_path / "here" / "data.jsonl", EXAMPLES)
    questions = [
        {
            "question": f"w{i:03}",
            "mc1_targets": {"w007": 1, "w009": 0},
            "mc2_targets": {"w007": 1, "w009": 0},
        }
        for i in range(20, 30)
    ]
    (tmp_path / "here" / "mc.json").write_text(json.dumps(questions))
    return tmp_path / "here"


@contextmanager
def full_disk():
    """Files can be made, and no byte can be written into them."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def state(place):
    return {p: p.is_file() and p.read_bytes() for p in place.rglob("*")}


def refused(result, named):
    code, _, err = result
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and named in last, err
    assert "Traceback" not in err


COMMANDS = {
    "warm-start data.jsonl new --base base --steps 1 --dtype float32": "new",
    "calibrate adapter data.jsonl --base base --force": "adapter/calibration.json",
    "evaluate truthfulqa --adapter adapter --base base --data mc.json --output runs": (
        "runs/truthfulqa.jsonl"
    ),
    "evaluate truthfulqa-open --adapter adapter --base base --data mc.json --output runs "
    "--max-new-tokens 2": "runs/truthfulqa-open.jsonl",
    "evaluate split truthfulqa parts --data mc.json --calibration 2": "parts/training.jsonl",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_full(run, place, command):
    before = state(place)
    with full_disk():
        result = run(*command.split())
    refused(result, COMMANDS[command])
    changed = {path for path, content in state(place).items() if content or path in before}
    assert changed <= before.keys() | {place / "runs", place / "parts"}


@pytest.mark.parametrize("command", COMMANDS)
def test_read_only(run, place, monkeypatch, command):
    def refuse(*arguments, **keywords):
        raise OSError(errno.EROFS, "Read-only file system", "a temporary name")

    before = state(place)
    monkeypatch.setattr(files.tempfile, "mkstemp", refuse)
    monkeypatch.setattr("svd_engine.training.partial_folder.Path.mkdir", refuse)
    refused(run(*command.split()), COMMANDS[command].partition("/")[0])
    assert state(place) == before


def test_full_at_the_last_checkpoint(run, place, monkeypatch):
    from svd_engine.training import trainer

    step = trainer.AdapterTrainer.training_step
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(self, *arguments):
        if self.state.global_step == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        return step(self, *arguments)

    command = "warm-start data.jsonl new --base base --steps 2 --checkpoint-every 1"
    command = [*command.split(), "--dtype", "float32", "--batch-size", "4"]
    try:
        with monkeypatch.context() as patch:
            patch.setattr(trainer.AdapterTrainer, "training_step", filling)
            refused(run(*command), ".new.partial cannot be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (place / "new").exists() and (place / ".new.partial/checkpoint-1").is_dir()
    assert run(*command)[0] == 0 and (place / "new/adapter_config.json").is_file()


@pytest.mark.parametrize("fault", ["plot", "report", "seen", "steering"])
def test_a_calibration_is_kept_as_one_step(run, place, monkeypatch, fault):
    SteeringConfig(-1.0).save_pretrained(place / "adapter")
    command = "calibrate adapter data.jsonl --base base --force --allow-overlap".split()
    assert run(*command)[0] == 0
    before = state(place)
    if fault == "plot":
        pytest.importorskip("matplotlib")

        def broken(figure):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(plots, "_png", broken)
    else:
        name = {
            "report": "calibration.json", "seen": "seen_prompts.json",
            "steering": "steering_config.json",
        }[fault]  # fmt: skip
        (place / "adapter" / name).unlink()
        (place / "adapter" / name).mkdir()
        before = state(place)
    code, _, err = run(*command, "--alpha", "0.5")
    assert code == 2 and err.strip().splitlines()[-1].startswith("error: ")
    assert state(place) == before
