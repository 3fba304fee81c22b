"""`python -m benchmarks.gpu` end to end on a CPU, and what becomes of sections that go wrong."""

import json
import subprocess
import sys
import time

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import correctness, linear, supervisor, tables, worker
from benchmarks.records import ROOT, read
from tests.ops import cases

pytestmark = pytest.mark.slow

SECTIONS = [
    "machine", "bandwidth", "correctness_cpu", "correctness_reference", "graph", "latency",
    "operators", "engine", "linear", "step", "tiles", "sanitizer",
]  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The command's output and its JSON."""
    path = tmp_path_factory.mktemp("gpu") / "cpu.json"
    command = ["-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--out", str(path)]
    ran = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, json.loads(path.read_text(encoding="utf-8"))


def test_every_section_runs(measured):
    sections = measured[1]["sections"]
    assert list(sections) == SECTIONS
    assert {name: entry["status"] for name, entry in sections.items()} == dict.fromkeys(
        SECTIONS, "ok"
    )
    for name in ("graph", "sanitizer"):
        assert sections[name]["result"] == {"skipped": "needs a CUDA device"}


def test_the_backends_are_right_on_every_case(measured):
    for backend in ("cpu", "reference"):
        result = measured[1]["sections"][f"correctness_{backend}"]["result"]
        assert result["failures"] == [] and "skipped: time" not in result
        assert all(worst["error"] <= worst["tolerance"] for worst in result["worst"].values())
        assert result["compared"] >= 3 * 50
        names = result["cases"][0].keys() - {"case"} | result["absent"].keys()
        assert names >= {"steer", "sample cut", "score", "topk", "project_strength", "divergence"}


def test_times_and_tokens(measured):
    sections = {name: entry["result"] for name, entry in measured[1]["sections"].items()}
    for case in sections["operators"]["cases"] + sections["latency"]["in a graph"]:
        assert "error" not in case and case["cold_us"] > 0 and case["bytes"] > 0
    assert all(case["us"] > 0 for case in sections["latency"]["host"])
    tiles = sections["tiles"]
    assert len(tiles["cases"]) == 2 * 3 * 2
    assert all(case["cold_us"] > 0 for case in tiles["cases"])
    linear = sections["linear"]
    assert linear["checked"] and linear["skipped"] == []
    assert all(case["of tolerance"] <= 1 for case in linear["checked"])
    assert all(case["us"] > 0 for case in linear["cases"])
    raced = {case["contender"] for case in linear["cases"]}
    assert raced == {"ours", "ours, LoRA", "torch", "torch, LoRA"}
    assert set(sections["engine"]["tokens equal"].values()) == {"ok"}
    raced = {(case["batch"], case["contender"]) for case in sections["engine"]["cases"]}
    assert {(1, "steered"), (1, "naive"), (1, "generate, merged"), (4, "generate, static")} <= raced
    assert not any("error" in case for case in sections["engine"]["cases"])


def test_the_tables(measured):
    output, result = measured
    text = tables.markdown(result)
    titles = [line[4:] for line in text.splitlines() if line.startswith("### ")]
    for begins in (
        "Sections",
        "Correctness",
        "One row, V = 500",
        "Host time",
        "V = 500",
        "Linear layers of tiny",
        "The eng",
        "Other splits",
    ):
        assert any(title.startswith(begins) for title in titles)
        assert begins in output
    assert not {"Not right", "Linear layers that were not right"} & set(titles)
    assert "`python -m benchmarks.gpu --device cpu --quick`" in text.splitlines()[0]


def test_the_json_says_nothing_of_where_it_ran(measured):
    assert str(ROOT) not in json.dumps(measured[1])


FATE = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from benchmarks.gpu.worker import work

def raises(run):
    run.keep({{"half": 1}}, every=0)
    raise RuntimeError("the kernel said no")

def dies(run):
    run.keep({{"half": 2}}, every=0)
    os._exit(139)

sections = {{
    "good": (lambda run: {{"answer": float("nan")}}, 30),
    "raises": (raises, 30),
    "dies": (dies, 30),
    "hangs": (lambda run: time.sleep(100), {hang}),
    "last": (lambda run: run.before("raises"), 30),
}}
path, end, *names = sys.argv[1:]
sys.exit(work(Path(path), names, sections, "cpu", True, float(end)))
"""


def fate(tmp_path, end, names=("good", "raises", "dies", "hangs", "last")):
    script, path = tmp_path / "worker.py", tmp_path / "out.json"
    text = FATE.format(root=str(ROOT), hang=4)
    script.write_text(text, encoding="utf-8")
    worker.save(path, {"sections": {}})
    supervisor.drive(path, names, [sys.executable, str(script), str(path), str(end)], end)
    return read(path)["sections"]


def test_a_section_that_fails_crashes_or_hangs_costs_only_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "GRACE", 1.0)
    entries = fate(tmp_path, time.time() + 100)
    assert entries["good"]["result"] == {"answer": "nan"}
    assert "RuntimeError: the kernel said no" in entries["raises"]["error"]
    assert "exit code 139" in entries["dies"]["error"]
    assert "killed after" in entries["hangs"]["error"]
    assert [entries[name]["result"] for name in ("raises", "dies")] == [{"half": 1}, {"half": 2}]
    assert entries["last"]["status"] == "ok" and entries["last"]["result"] == {"half": 1}


def test_no_section_starts_when_the_time_is_over(tmp_path):
    entries = fate(tmp_path, time.time(), ("good", "last"))
    assert [entry["skipped"] for entry in entries.values()] == ["time", "time"]


def test_a_wrong_kernel_is_found(monkeypatch):
    """Each of these mistakes is one that the section must see."""
    steer, sample = (cases.OPERATORS[name] for name in ("steer", "sample greedy"))

    def spoil(operator, change):
        def run(z, b, o, backend, out):
            outputs = operator.run(z, b, o, "reference", out)
            return change(*outputs) if backend == "cpu" else outputs

        return operator._replace(run=run)

    def shifted(x):
        return (x + 1e-3,)

    def without_infinity(x):
        return (x.nan_to_num(0.0, neginf=-1e30),)

    def next_token(token, logprob):
        return token + 1, logprob

    for name, operator, change in (
        ("steer", steer, shifted),
        ("steer", steer, without_infinity),
        ("sample greedy", sample, next_token),
    ):
        case = next(c for c, _ in cases.cases("cpu", True) if c.name == "float32, V = 100")
        with monkeypatch.context() as patch:
            patch.setitem(cases.OPERATORS, name, spoil(operator, change))
            try:
                assert correctness.check(name, "cpu", case).ratio > 1
            except correctness.WrongError:
                pass


def test_a_wrong_linear_is_found(tmp_path, monkeypatch):
    right = linear._ours("cpu")

    def spoilt(*arguments):
        right(*arguments)
        arguments[-1][-1, -1] *= 1 + 2.0**-6

    monkeypatch.setattr(linear, "_ours", lambda device: spoilt)
    worker.save(tmp_path / "out.json", {"sections": {}})
    run = worker.Run(tmp_path / "out.json", "linear", "cpu", True, 30.0, time.time() + 30)
    result = linear.section(run)
    assert result["cases"] == []
    assert all("of what is allowed" in case["error"] for case in result["checked"])


def test_without_a_cuda_device_the_command_says_so(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "RuntimeError: no NVIDIA driver\n")
    monkeypatch.setattr(command.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match=r"no NVIDIA driver\n--device cpu --quick"):
        command.main([])


def test_only_names_sections(capsys):
    with pytest.raises(SystemExit):
        command.main(["--device", "cpu", "--only", "nonsense"])
    assert "--only must begin one of machine" in capsys.readouterr().err


def test_sections_that_are_not_measured_again_keep_their_date(tmp_path, monkeypatch, capsys):
    path = tmp_path / "gpu.json"
    done = {"status": "ok", "seconds": 1.0, "result": {}}
    before = {"graph": done, "step": {"date": "2026-01-02"} | done, "machine": done}
    worker.save(path, {"date": "2026-02-03", "sections": before})
    monkeypatch.setattr(supervisor, "drive", lambda *_: None)
    command.main(["--device", "cpu", "--quick", "--only", "machine", "--out", str(path)])
    dates = {name: entry["date"] for name, entry in read(path)["sections"].items()}
    assert dates == {"graph": "2026-02-03", "step": "2026-01-02"}
