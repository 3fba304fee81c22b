"""Every program of examples/ runs, offline, on a tiny model."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from svd_engine import SteeringConfig

FOLDER = Path(__file__).parents[1] / "examples"
PROGRAMS = sorted(path.stem for path in FOLDER.glob("*.py"))
PRINTED = {
    "calibrate": r"strength [+-]\d+\.\d\d \[.*\], alpha 0\.(03|1|3)\nloss on held-out folds",
    "generate": r"base     .*\n.*\nadapted  .*\n.*\nsteered  .*\n.*\nsampled .",
    "hugging_face_generate": r"adapted:\n.+\nsteered:\n.+\n",
    "own_loop": r"w\d{3}",
}


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """The tiny base under base, and under adapter what calibration may write into."""
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
        for file in (tiny_folder / name).iterdir():
            (tmp_path / name / file.name).symlink_to(file)
    examples = [
        dict(prompt=f"w{i:03} w017", completion="w033 w005", rejected=["w101", "w200 w004"])
        for i in range(5, 11)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    return tmp_path


def test_each_has_a_test():
    assert set(PROGRAMS) == set(PRINTED)


@pytest.mark.parametrize("program", PROGRAMS)
def test_it_runs(program, folder, monkeypatch, capsys):
    data = ["data.jsonl"] if program == "calibrate" else []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{program}.py", "adapter", *data, "base"])
    runpy.run_path(str(FOLDER / f"{program}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.match(PRINTED[program], printed), printed
    if program == "calibrate":
        assert SteeringConfig.from_pretrained("adapter").objective == "preference"
