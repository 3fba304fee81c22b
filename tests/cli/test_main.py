"""The command: the whole path on a tiny model, and errors of one line with exit code 2."""

import json
import subprocess
import sys

import pytest
import typer

from svd_engine import __main__, __version__, ops
from svd_engine.cli import STOPPED, main
from tests.tiny import tiny_base, tiny_peft


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


EXAMPLES = [
    dict(prompt=f"w005 w{20 + i:03}", completion="w007 w008", rejected=["w009 w008", "w010"])
    for i in range(12)
]


def test_the_whole_path(run, tmp_path, tiny_folder):
    base = tiny_folder / "base"
    data = write(tmp_path / "data.jsonl", EXAMPLES)
    code, out, _ = run(
        "warm-start", data, tmp_path / "adapter", "--base", base, "--steps", 3,
        "--dtype", "float32",
    )  # fmt: skip
    assert code == 0 and "Adapter written" in out
    code, out, err = run("generate", "w005", "--adapter", tmp_path / "adapter", "--base", base)
    assert code == 2 and "svd-engine calibrate" in err
    calibrate = ["calibrate", tmp_path / "adapter", data, "--base", base, "--force"]
    check_error(run(*calibrate), "12 of 12 prompts were seen in training")
    code, out, _ = run(*calibrate, "--allow-overlap", "--alpha", "0.1", "--alpha", "0.5")
    assert code == 0 and "Verdict: " in out and "preference loss, held out" in out
    code, out, _ = run(*calibrate, "--allow-overlap", "--direction", "difference")
    assert code == 0 and "difference" in out and "Distinct-1 and -2" in out
    kept = json.loads((tmp_path / "adapter" / "steering_config.json").read_text())
    assert kept["generation"]["direction"] == "difference"
    code, out, _ = run(*calibrate, "--allow-overlap", "--use", "ranking", "--direction", "auto")
    assert code == 0 and "Candidates" in out and "ranking a token" in out and "Texts" not in out
    both = json.loads((tmp_path / "adapter" / "steering_config.json").read_text())
    assert both["generation"] == kept["generation"] and "strength" in both["ranking"]
    names = {p.name for p in (tmp_path / "adapter").iterdir()}
    written = {"steering_config.json", "calibration.json", "seen_prompts.json"}
    assert written | {"adapter_config.json"} <= names
    options = ["--adapter", tmp_path / "adapter", "--base", base, "--max-new-tokens", 5]
    code, out, err = run("generate", "w005 w021", *options)
    assert code == 0 and out.startswith("w") and "ms per token" in err
    assert run("generate", *options, stdin="w005 w021\n")[1] == out
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w005 w021\n\nw005 w022\n")
    code, out, _ = run("generate", "--file", prompts, "--compare", *options)
    assert code == 0
    assert [out.count(model) for model in ("base", "adapted", "steered")] == [2, 2, 2]


def test_generate_as_json_and_with_choices(run, tiny_folder):
    options = [
        "--adapter", tiny_folder / "adapter", "--base", tiny_folder / "base", "--strength", -2,
        "--max-new-tokens", 6,
    ]  # fmt: skip
    prompts = ["w005 w021", "w101"]
    code, out, _ = run("generate", *prompts, *options, "--json", "--compare")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [(line["prompt"], line["model"]) for line in lines] == [
        (prompt, model) for model in ("base", "adapted", "steered") for prompt in prompts
    ]
    assert lines[5]["token_ids"] and lines[5]["prompt_tokens"] == 1
    streamed = run("generate", prompts[1], *options)[1]
    assert streamed == lines[5]["text"] + "\n"
    stop = lines[5]["text"].split()[2]
    assert stop not in run("generate", prompts[1], *options, "--stop", stop)[1]

    sampled = ["--temperature", 1.2, "--seed", 3, "-n", 2, "--repetition-penalty", 1.3]
    code, out, _ = run("generate", *prompts, *options, *sampled, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == [p for p in prompts for _ in range(2)]
    out = run("generate", prompts[1], *options, *sampled)[1]
    assert out.splitlines() == [line["text"] for line in lines[2:]]
    code, out, _ = run("generate", prompts[1], *options, "--beams", 3, "-n", 2)
    assert code == 0 and len(out.splitlines()) == 2
    check_error(run("generate", "w005", *options, "--beams", 2, "-n", 3), "at most num_beams = 2")

    gone = ["--set", f"suppress_tokens={lines[2]['token_ids'][:1]}", "--set", "min_new_tokens=6"]
    code, out, _ = run("generate", prompts[1], *options, *gone, "--json")
    got = json.loads(out)["token_ids"]
    assert code == 0 and lines[2]["token_ids"][0] not in got and len(got) == 6
    for setting, message in {
        "max_tokens=3": "'max_tokens' is max_new_tokens here",
        "colour=3": "there is no option 'colour'",
        "seed=3": "there is no option 'seed'",
        "min_length": "--set takes NAME=VALUE",
        "min_length=short": "min_length must be an integer",
    }.items():
        check_error(run("generate", "w005", *options, "--set", setting), message)

    template = tiny_folder / "base" / "chat_template.jinja"
    template.write_text("{% for m in messages %}w010 {{ m.content }} {% endfor %}w011")
    try:
        chat = run("generate", "w005", *options, "--chat")[1]
    finally:
        template.unlink()
    assert chat == run("generate", "w010 w005 w011", *options)[1]


def test_version_help_and_environment(run, tiny_folder):
    assert run("--version")[:2] == (0, f"{__version__}\n")
    code, out, _ = run("--help")
    assert code == 0 and all(c in out for c in ("warm-start", "calibrate", "generate", "demo"))
    pair = ["--base", tiny_folder / "base", "--adapter", tiny_folder / "adapter"]
    code, out, _ = run("env", *pair, "--dtype", "float16")
    assert code == 0 and "decode step" in out and "module by module, because the weights" in out
    code, out, _ = run("env")
    assert code == 0 and "backend cpu" in out and "backend triton" in out and "torch" in out
    assert f"version {ops.NOISE_VERSION}" in out


def commands(command, name=()):
    yield name, command
    for own, sub in getattr(command, "commands", {}).items():
        yield from commands(sub, (*name, own))


def test_every_option_says_what_it_is():
    found = list(commands(typer.main.get_command(main.app)))
    assert len(found) > 12
    for name, command in found:
        assert name == () or command.help or command.params == [], name
        for parameter in command.params:
            assert parameter.help, (name, parameter.name)


def test_the_bars_of_libraries_are_hidden():
    """In a process of its own, for good."""
    bar = "from tqdm.auto import tqdm; list(tqdm([1], desc='theirs'))"
    ours = "list(tqdm([1], desc='ours', disable=False))"
    code = f"from svd_engine.cli import main; main._quiet({{}}); {bar}; {ours}"
    for verbose in (False, True):
        command = [sys.executable, "-c", code.format(verbose)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert ("theirs" in done.stderr) is verbose and "ours" in done.stderr, done.stderr


def test_a_file_is_one_prompt(run, tmp_path, tiny_folder):
    options = [
        "--adapter", tiny_folder / "adapter", "--base", tiny_folder / "base", "--strength", -2,
        "--max-new-tokens", 3, "--json",
    ]  # fmt: skip
    text = "w005 w021\n\nw007 \\n w003"
    (tmp_path / "prompt.txt").write_text(text + "\n")
    code, out, _ = run("generate", "--file", tmp_path / "prompt.txt", "--whole", *options)
    (line,) = map(json.loads, out.splitlines())
    assert code == 0 and line["prompt"] == text
    other = json.loads(run("generate", "--whole", *options, stdin=text)[1])
    assert (other["prompt"], other["token_ids"]) == (text, line["token_ids"])
    check_error(run("generate", "w005", "--whole", *options), "--whole is about --file")
    text = r"w005 \nabla w006"  # a line break in an argument alone
    lines = tmp_path / "lines.txt"
    lines.write_text(text + "\n")
    for arguments, stdin, wanted in (
        (["--file", lines], "", text), ([], text, text), ([text], "", "w005 \nabla w006"),
    ):  # fmt: skip
        out = run("generate", *arguments, *options, stdin=stdin)[1]
        assert json.loads(out)["prompt"] == wanted


def check_error(result, *parts):
    code, _, err = result
    assert code == 2 and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err
    for part in parts:
        assert part in err, err


def test_errors_are_one_line(run, tmp_path, tiny_folder):
    base, adapter = tiny_folder / "base", tiny_folder / "adapter"
    data = write(tmp_path / "data.jsonl", EXAMPLES)
    at = ["--base", base]
    new = tmp_path / "new"
    generate = ["generate", "w005", "--strength", "1", *at, "--adapter"]

    check_error(run(*generate, tmp_path / "absent"), "does not exist")
    check_error(run(*generate, tmp_path), "no adapter_config.json")
    check_error(run("generate", "w005", "--adapter", adapter, *at), "no steering_config.json")
    check_error(run("generate", "--adapter", adapter, *at, stdin=""), "no prompts came")
    check_error(run(*generate, adapter, "--max-new-tokens", "500"), "the model's context is 128")
    check_error(run(*generate, adapter, "--temperature", "-1"), "temperature must be")
    check_error(run(*generate, adapter, "--chat"), "no chat template")
    check_error(run("generate", "w", "--file", data, "--adapter", adapter), "not both")

    other = tiny_peft("gpt2")
    other.save_pretrained(tmp_path / "gpt2", save_embedding_layers=False)
    check_error(run(*generate, tmp_path / "gpt2"), "does not fit the base", "LlamaForCausalLM")

    empty = write(tmp_path / "empty.jsonl", [])
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(EXAMPLES[0]) + "\n{oops\n")
    check_error(run("calibrate", adapter, empty, *at), "holds no examples")
    check_error(run("calibrate", adapter, broken, *at), f"{broken}:2: not JSON")
    check_error(run("calibrate", adapter, tmp_path / "no", *at), "does not exist")
    check_error(run("warm-start", broken, new, *at), "broken.jsonl:2: not JSON")
    check_error(run("warm-start", data, new, *at, "--method", "qlora"), "method must be one of")
    check_error(run("warm-start", data, new, *at, "--learning-rate", "fast"), "learning_rate must")
    check_error(run("warm-start", data, new, "--base", tmp_path / "b"), "cannot be loaded")
    assert not new.exists() and not (adapter / "steering_config.json").exists()

    (adapter / "steering_config.json").write_text('{"strength": 1.0, "vocab_size": 999}')
    try:
        message = "vocabulary of 999 tokens; the model has 211"
        check_error(run("generate", "w005", "--adapter", adapter, *at), message)
        # What is calibrated anew may be of another vocabulary.
        assert run("calibrate", adapter, data, *at)[0] == 0
        assert run("generate", "w005", "--adapter", adapter, *at, "--max-new-tokens", 2)[0] == 0
    finally:
        for name in ("steering_config.json", "seen_prompts.json", "calibration.json"):
            (adapter / name).unlink(missing_ok=True)
        (adapter / "calibration.png").unlink(missing_ok=True)


def test_verbose_shows_where_an_error_came_from(run, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        run("--verbose", "warm-start", tmp_path / "no.jsonl", tmp_path / "out")


def test_ctrl_c_is_told_in_a_line(run, tmp_path, tiny_folder, monkeypatch):
    from transformers import Trainer

    def interrupted(self, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", interrupted)
    data = write(tmp_path / "data.jsonl", EXAMPLES)
    code, _, err = run("warm-start", data, tmp_path / "a", "--base", tiny_folder / "base")
    assert code == 130 and "nothing half-written" in err
    assert [p.name for p in tmp_path.iterdir()] == ["data.jsonl"]


def test_ctrl_c_before_the_libraries_are_there(monkeypatch, capsys):
    class Interrupted:
        def find_spec(self, name, *_):
            if name == "svd_engine.cli.main":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "svd_engine.cli.main")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    assert stop.value.code == 130 and capsys.readouterr().err == STOPPED + "\n"


def test_an_adapter_of_another_width_is_refused(run, tmp_path, tiny_folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = tiny_base("llama").config.to_dict() | dict(hidden_size=64, head_dim=16)
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(tmp_path / "wide")
    (tiny_folder / "base" / "tokenizer.json").rename(tmp_path / "wide" / "tokenizer.json")
    try:
        (tmp_path / "wide" / "tokenizer_config.json").write_bytes(
            (tiny_folder / "base" / "tokenizer_config.json").read_bytes()
        )
        result = run(
            "generate", "w005", "--strength", "1", "--base", tmp_path / "wide",
            "--adapter", tiny_folder / "adapter",
        )  # fmt: skip
    finally:
        (tmp_path / "wide" / "tokenizer.json").rename(tiny_folder / "base" / "tokenizer.json")
    check_error(result, "does not fit the base", "hidden size 64")
