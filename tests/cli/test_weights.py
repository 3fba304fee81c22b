"""`--weights`: every command that decodes hands it to the engine."""

import json
import re
from importlib.util import find_spec

import pytest

from svd_engine.ops import cpu

COMMANDS = {
    "env": ["env"],
    "generate": ["generate", "w005"],
    "chat": ["chat"],
    "explain": ["explain", "prompts.jsonl", "page.html"],
    "serve": ["serve", "--port", 0],
    "truthfulqa": ["evaluate", "truthfulqa", "--data", "mc_task.json"],
    "truthfulqa-open": ["evaluate", "truthfulqa-open", "--data", "mc_task.json"],
    "commonsense": ["evaluate", "commonsense", "--data", "arc.json", "--task", "arc-easy"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_it(run, tiny_folder, tmp_path, monkeypatch, name):
    if name == "serve" and not (find_spec("fastapi") and find_spec("prometheus_client")):
        pytest.skip("fastapi is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w005"}')
    targets = {"mc1_targets": {"w007": 1, "w009": 0}, "mc2_targets": {"w007": 1, "w009": 0}}
    questions = [{"question": f"w{20 + i:03}?", **targets} for i in range(20)]
    (tmp_path / "mc_task.json").write_text(json.dumps(questions))
    problem = dict(instruction="w020\n\nAnswer format: answer1/answer2", input="")
    problem |= dict(output="the correct answer is answer1", answer="answer1")
    (tmp_path / "arc.json").write_text(json.dumps([problem]))
    options = ["--adapter", tiny_folder / "adapter", "--base", tiny_folder / "base"]
    steered = [] if name == "env" else ["--strength", -2]
    code, _, err = run(*COMMANDS[name], *options, *steered, "--weights", "int3")
    assert (code, err) == (2, "error: weights must be int8 or int4; got 'int3'.\n"), err


@pytest.mark.skipif(cpu.unavailable() is not None, reason="no native kernels")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_env_says_how_a_step_runs_over_codes(run, tiny_folder, weights):
    asked = ["env", "--adapter", tiny_folder / "adapter", "--base", tiny_folder / "base"]
    code, out, err = run(*asked, "--weights", weights)
    says = f"decode step +one native call, {weights} weights"
    assert code == 0 and re.search(says, out), err

    code, out, err = run("env", "--weights", weights)
    assert (code, out) == (2, "") and "--base and --weights are about an adapter" in err
