"""Text of others is never markup: square brackets and colons come out as they went in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from svd_engine.cli import tables, terminal

ODD = "[/red] [bold]x[/] :smile: [link=http://a.b] [[1]]"


def test_prompts(run, tiny_folder):
    options = ["--adapter", tiny_folder / "adapter", "--base", tiny_folder / "base"]
    options += ["--strength", 1, "--max-new-tokens", 2]
    code, out, _ = run("generate", ODD, "w005", *options)
    assert code == 0 and ODD in out
    code, out, _ = run("generate", ODD, "--compare", *options)
    assert code == 0 and ODD in out
    code, out, _ = run("generate", ODD, "--json", *options)
    assert code == 0 and json.loads(out)["prompt"] == ODD


@pytest.mark.parametrize(
    "name", [ODD.replace("/", "|"), "[red]", "[/]", "a\nb", "\x1b[31m", "\udcff"]
)
def test_paths_and_errors(run, tmp_path, tiny_folder, name):
    shown = terminal.one_line(name)
    code, _, err = run("calibrate", tmp_path / name, tmp_path / name / "no", "--base", name)
    assert code == 2 and shown in err and len(err.splitlines()) == 1 and "\x1b[31m" not in err
    code, _, err = run("warm-start", tmp_path / "no", tmp_path / "new", "--method", name)
    assert code == 2 and len(err.splitlines()) == 1
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"prompt": "w005", "completion": "w006"}))
    code, _, err = run(
        "warm-start", data, tmp_path / "new", "--method", name, "--base", tiny_folder / "base"
    )
    assert code == 2 and "method must be one of" in err


def test_where_a_file_was_written(run, tmp_path, tiny_folder):
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "w005", "completion": "w006"}))
    output = tmp_path / "[bold] :smile:"
    code, out, _ = run(
        "warm-start", tmp_path / "train.jsonl", output, "--base", tiny_folder / "base",
        "--steps", 1, "--dtype", "float32",
    )  # fmt: skip
    assert code == 0 and f"Adapter written to {output}" in out


def test_cells_titles_and_notes(run, capsys):
    table = tables.grid(ODD, ODD)
    table.add_row(ODD, ODD)
    run()  # with the consoles of the test
    terminal.show(tables.section(ODD, table, ODD))
    assert capsys.readouterr().out.count(ODD) == 6


def test_what_typer_says(run):
    for arguments in (["generate", "--device"], [ODD], ["generate", f"--{ODD}"], ["env", ODD]):
        code, _, err = run(*arguments)
        assert code == 2 and "Traceback" not in err
    assert ODD.split()[0] in run(ODD)[2]


def command(*arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-m", "svd_engine.cli.main", *arguments],
        env=environment, stderr=subprocess.PIPE, text=True, check=False, **options,
    )  # fmt: skip


@pytest.mark.slow
def test_a_full_and_a_closed_standard_output():
    with open("/dev/full", "w") as full:
        done = command("env", stdout=full)
    assert done.returncode == 2
    assert done.stderr == "error: standard output cannot be written: No space left on device\n"
    reading, writing = os.pipe()
    os.close(reading)
    done = command("--version", stdout=writing)
    os.close(writing)
    assert done.returncode == 2
    assert done.stderr == "error: standard output cannot be written: Broken pipe\n"


def test_no_standard_output_at_all():
    done = command("--version", preexec_fn=lambda: os.close(1))
    assert done.returncode == 0 and not done.stderr
