"""`svd-engine evaluate`: every command on a tiny model, from split to table."""

import json
import re
import shutil

import pytest

from svd_engine import SteeringConfig
from svd_engine.data import contamination, examples
from svd_engine.evaluate import commonsense, truthfulqa
from svd_engine.ops import cpu
from tests.evaluate.test_judge import server  # noqa: F401


@pytest.fixture
def evaluate(run):
    """Run `svd-engine evaluate`; returns (exit code, output and errors)."""

    def call(*arguments):
        code, out, err = run("evaluate", *arguments)
        return code, out + err

    return call


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """A steered adapter, a TruthfulQA of 20 questions and an ARC-Easy of 12 and 6."""
    root = tmp_path_factory.mktemp("evaluate")
    shutil.copytree(tiny_folder / "adapter", root / "adapter")
    SteeringConfig(-3.0, alpha=0.05).save_pretrained(root / "adapter")
    items = [
        {
            "question": f"w{20 + i:03} w{40 + i:03}?",
            "mc1_targets": {"w007 w008": 1, "w009": 0},
            "mc2_targets": {"w007 w008": 1, "w010": 1, "w009": 0, f"w{60 + i:03}": 0},
        }
        for i in range(20)
    ]
    (root / "mc_task.json").write_text(json.dumps(items))
    problems = [
        {
            "instruction": f"w{20 + i:03}\n\nAnswer format: answer1/answer2",
            "input": "",
            "output": f"the correct answer is answer{i % 2 + 1}",
            "answer": f"answer{i % 2 + 1}",
        }
        for i in range(18)
    ]
    (root / "ARC-Easy").mkdir()
    (root / "ARC-Easy" / "train.json").write_text(json.dumps(problems[:12]))
    (root / "ARC-Easy" / "test.json").write_text(json.dumps(problems[12:]))
    return root


@pytest.fixture
def options(folder, tiny_folder, tmp_path):
    contamination.record(folder / "adapter", "training", ["nothing"])
    return ["--adapter", folder / "adapter", "--base", tiny_folder / "base", "--output", tmp_path]


def test_truthfulqa(evaluate, folder, options, tmp_path):
    data = ["truthfulqa", "--data", folder / "mc_task.json", *options]
    code, out = evaluate(*data)
    assert code == 0 and "steered - adapted" in out and "the adapter saw 0 in training" in out
    result = json.loads((tmp_path / "truthfulqa.json").read_text())
    assert result["questions"] == 4 and result["columns"] == ["MC1", "MC2", "MC3", "average"]
    assert list(result["models"]) == ["base", "adapted", "steered"]
    assert result["settings"]["prompt"] == "plain" and result["settings"]["split_seed"] == 0
    # The table is what the kept scores say.
    lines = [json.loads(x) for x in (tmp_path / "truthfulqa.jsonl").read_text().splitlines()[1:]]
    assert [line["id"] for line in lines] == [0, 1, 2, 3]
    tested = truthfulqa.Question("", "", ["a", "b"], ["c", "d"], ["c"])
    mc1 = [tested.metrics(line["scores"]["steered"])[0] for line in lines]
    assert result["models"]["steered"]["MC1"]["mean"] == 100 * sum(mc1) / 4
    first = (tmp_path / "truthfulqa.json").read_bytes()
    assert evaluate(*data)[0] == 0 and (tmp_path / "truthfulqa.json").read_bytes() == first
    assert evaluate(*data, "--overwrite")[0] == 0
    assert (tmp_path / "truthfulqa.json").read_bytes() == first
    code, out = evaluate(*data, "--strength", 2)
    assert code == 2 and "holds results of other settings (steering:" in out
    code, out = evaluate(*data, "--strength", 2, "--limit", 2, "--overwrite")
    assert code == 0 and "truthfulqa: 2 questions" in out
    assert "| base |" in (tmp_path / "truthfulqa.md").read_text()


def test_a_larger_limit_goes_on(evaluate, folder, options, tmp_path):
    data = ["truthfulqa", "--data", folder / "mc_task.json", *options]
    kept, whole = tmp_path / "truthfulqa.jsonl", tmp_path / "whole"
    assert evaluate(*data, "--limit", 1)[0] == 0
    first = kept.read_text().splitlines()
    code, out = evaluate(*data, "--limit", 3)
    assert code == 0 and "truthfulqa: 3 questions" in out
    assert kept.read_text().splitlines()[1] == first[1] and len(first) == 2
    assert evaluate(*data)[0] == 0 and evaluate(*data, "--output", whole)[0] == 0
    got, wanted = kept.read_text().splitlines(), (whole / kept.name).read_text().splitlines()
    assert got[0] == wanted[0] and len(got) == len(wanted) == 5
    for one, other in zip(got[1:], wanted[1:], strict=True):
        one, other = json.loads(one), json.loads(other)
        assert one["question"] == other["question"]
        for model, scores in other["scores"].items():
            assert one["scores"][model] == pytest.approx(scores, abs=1e-4)
    before = kept.read_bytes()
    code, out = evaluate(*data, "--limit", 2)
    assert code == 2 and "questions: 4, now 2" in out and kept.read_bytes() == before
    code, out = evaluate(*data, "--limit", 4, "--prompt", "primer")
    assert code == 2 and "prompt: 'plain', now 'primer'" in out and kept.read_bytes() == before


def test_the_folder_is_named_by_adapter_and_settings(
    evaluate, folder, options, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    data = ["truthfulqa", "--data", folder / "mc_task.json", *options[:-2]]
    codes = [("--weights", "int8"), ("--weights", "int4")] if cpu.unavailable() is None else []
    for more in ((), ("--limit", 2), ("--strength", 2), ("--prompt", "primer"), *codes):
        assert evaluate(*data, "--limit", 1, *more)[0] == 0
    found = sorted(path.name for path in (tmp_path / "runs" / "evaluate").iterdir())
    assert len(found) == 3 + len(codes) and all(
        re.fullmatch(r"adapter-[0-9a-f]{8}", name) for name in found
    )


def test_overlap_is_refused(evaluate, folder, options, tmp_path):
    out = tmp_path / "parts"
    code, said = evaluate(
        "split", "truthfulqa", out, "--data", folder / "mc_task.json", "--calibration", 3,
        "--split-seed", 5, "--prompt", "primer",
    )  # fmt: skip
    assert code == 0 and "4 questions to" in said
    parts = {k: examples.read(out / f"{k}.jsonl") for k in ("training", "calibration", "test")}
    assert [len(part) for part in parts.values()] == [13, 3, 4]
    for kind in ("training", "calibration"):
        contamination.record(folder / "adapter", kind, contamination.prompts(parts[kind]))
    same = ["truthfulqa", "--data", folder / "mc_task.json", "--split-seed", 5, *options]
    code, said = evaluate(*same)
    assert code == 0 and "the adapter saw 0 in training, 0 in calibration" in said
    other = ["truthfulqa", "--data", folder / "mc_task.json", "--split-seed", 6, *options]
    code, said = evaluate(*other)
    assert code == 2 and "prompts were seen in" in said and "--allow-overlap" in said
    code, said = evaluate(*other, "--allow-overlap", "--overwrite")
    assert code == 0 and "the adapter saw 0 in training" not in said
    (folder / "adapter" / contamination.FILE_NAME).unlink()
    code, said = evaluate(*other, "--overwrite")
    assert code == 0 and "not recorded which questions" in said


def test_open_answers_and_their_judge(evaluate, folder, options, tmp_path, monkeypatch, server):  # noqa: F811
    monkeypatch.delenv("SVD_JUDGE_URL", raising=False)
    data = ["truthfulqa-open", "--data", folder / "mc_task.json", *options]
    code, out = evaluate(*data, "--max-new-tokens", 5)
    answers = tmp_path / "truthfulqa-open.jsonl"
    assert code == 0 and f"evaluate judge {answers}" in out
    assert not (tmp_path / "truthfulqa-open.json").exists()
    code, out = evaluate("judge", answers)
    assert code == 2 and "set SVD_JUDGE_URL" in out
    monkeypatch.setenv("SVD_JUDGE_URL", server.url)
    monkeypatch.setenv("SVD_JUDGE_MODEL", "m")
    code, out = evaluate("judge", answers)
    assert code == 0 and "truthful" in out and "steered - adapted" in out
    asked = len(server.prompts)
    assert 0 < asked <= 4 * 3 * 2
    result = json.loads((tmp_path / "truthfulqa-open.json").read_text())
    assert result["models"]["base"]["both"]["mean"] == 100 and result["settings"]["judge"] == "m"
    code, out = evaluate(*data, "--max-new-tokens", 5)  # all is there
    assert code == 0 and "steered - adapted" in out and len(server.prompts) == asked


@pytest.mark.parametrize("by", ["likelihood", "generation"])
def test_commonsense(evaluate, folder, options, tmp_path, by):
    data = ["commonsense", "--data", folder, "--task", "arc-easy", "--by", by, *options]
    code, out = evaluate(*data, "--max-new-tokens", 4)
    assert code == 0 and f"arc-easy-{by}: 6 questions" in out
    result = json.loads((tmp_path / f"arc-easy-{by}.json").read_text())
    wanted = ["accuracy"] if by == "likelihood" else ["accuracy", "answered"]
    assert result["columns"] == wanted and len(result["models"]) == 3
    assert evaluate(*data[:-2], "--output", tmp_path / "more", "--limit", 2)[0] == 0


def test_commonsense_split(evaluate, folder, tmp_path):
    code, out = evaluate(
        "split", "commonsense", tmp_path, "--data", folder, "--task", "arc-easy", "--calibration", 4
    )
    assert code == 0 and "8 questions to" in out
    line = examples.read(tmp_path / "calibration.jsonl")[0]
    assert line["prompt"].startswith(commonsense.TEMPLATE[:40]) and len(line["rejected"]) == 1


def test_errors_are_one_line(evaluate, folder, options, tmp_path):
    for arguments, message in (
        (["truthfulqa"], "give --data with a file, or --hub"),
        (["truthfulqa", "--data", folder / "absent.json"], "absent.json does not exist"),
        (["truthfulqa", "--data", folder / "mc_task.json", "--prompt", "x"], "plain, primer"),
        (["truthfulqa", "--data", folder / "mc_task.json", "--limit", 0], "--limit must be >= 1"),
        (["commonsense", "--data", folder, "--task", "x"], "task must be one of"),
        (["commonsense", "--data", folder, "--task", "piqa"], "piqa/test.json"),
        (["commonsense", "--data", folder, "--task", "arc-easy", "--by", "x"], "--by must be"),
    ):
        code, out = evaluate(*arguments, *options)
        assert code == 2 and message in out and "Traceback" not in out, out
    assert not list(tmp_path.iterdir())


def test_help(evaluate):
    code, out = evaluate("--help")
    names = ("truthfulqa", "truthfulqa-open", "judge", "commonsense", "split")
    assert code == 0 and all(name in out for name in names)
