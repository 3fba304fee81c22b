"""Hostile files and command lines: exit code 2 and one line that names the file or the option."""

import json
import shutil
import struct

import pytest

from svd_engine import SteeringConfig

pytestmark = pytest.mark.slow  # they are hundreds
NESTED = 100_000
HUGE = "9" * 400
# Contents that are no JSON object.
NO_OBJECT = {
    "nothing": b"",
    "bytes": b"\x00\xff\xfe\x80",
    "latin-1": '{"a": "é"}'.encode("latin-1"),
    "cut": b'{"strength": ',
    "a list": b"[]",
    "a number": b"5",
    "null": b"null",
    "a text": b'"x"',
    "deep lists": b"[" * NESTED,
    "deep objects": b'{"a":' * NESTED,
    "5000 digits": b'{"strength": ' + b"9" * 5000 + b"}",
}
GENERATE = "generate w005 --adapter adapter --base base --max-new-tokens 2"
TRAIN = "warm-start train.jsonl new --base base --steps 1 --dtype float32"
CALIBRATE = "calibrate adapter calibration.jsonl --base base"
TRUTHFULQA = "evaluate truthfulqa --adapter adapter --base base --data mc.json --output runs"
COMMONSENSE = (
    "evaluate commonsense --adapter adapter --base base --data problems.json --task piqa "
    "--output runs"
)
OPEN = (
    "evaluate truthfulqa-open --adapter adapter --base base --data mc.json --output runs "
    "--max-new-tokens 2"
)
JUDGE = "evaluate judge answers.jsonl"


def header(text, rest=b""):
    """A safetensors file with this header."""
    return struct.pack("<Q", len(text)) + text + rest


WEIGHTS = {
    "nothing": b"",
    "bytes": b"\x00\xff\xfe\x80" * 20,
    "a huge header": struct.pack("<Q", 1 << 62) + b"{}",
    "a header that is no JSON": header(b"{nothing"),
    "a header of another kind": header(b'{"a": 5}'),
    "an unknown dtype": header(b'{"a":{"dtype":"F3","shape":[1],"data_offsets":[0,4]}}', b"0000"),
    "offsets beyond the end": header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
}
ANSWER = {"question": "Why?", "right": ["So."], "wrong": ["No."], "answers": {"base": "So."}}


@pytest.fixture(scope="session")
def good(tiny_folder, tmp_path_factory):
    """A base, an adapter with a strength, and one good file of every kind."""
    root = tmp_path_factory.mktemp("hostile") / "good"
    shutil.copytree(tiny_folder, root)
    SteeringConfig(-2.0).save_pretrained(root / "adapter")
    lines = [
        json.dumps({"prompt": f"w005 w{i:03}", "completion": "w007", "rejected": ["w008"]})
        for i in range(20, 26)
    ]
    (root / "calibration.jsonl").write_text("\n".join(lines))
    (root / "train.jsonl").write_text("\n".join(lines[:2]))
    questions = [
        {
            "question": f"w{i:03}",
            "mc1_targets": {"w007": 1, "w009": 0},
            "mc2_targets": {"w007": 1, "w009": 0},
        }
        for i in range(20, 30)
    ]
    (root / "mc.json").write_text(json.dumps(questions))
    problem = {
        "instruction": "w020\n\nAnswer format: answer1/answer2",
        "output": "the correct answer is answer1",
        "answer": "answer1",
    }
    (root / "problems.json").write_text(json.dumps([problem]))
    (root / "answers.jsonl").write_text(json.dumps(ANSWER) + "\n")
    return root


@pytest.fixture
def place(good, tmp_path, monkeypatch):
    """A copy of the good files, as the working directory."""
    shutil.copytree(good, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("SVD_JUDGE_URL", "http://127.0.0.1:9/v1")  # nobody listens there
    monkeypatch.setenv("SVD_JUDGE_MODEL", "m")
    return tmp_path / "here"


def refused(result, *parts):
    code, _, err = result
    assert code == 2, result
    assert len(err.strip().splitlines()) == 1, err
    assert all(part in err for part in parts), err


def cases(*groups):
    """(file, content, command) of `(files, contents, command)`, with readable ids."""
    return [
        pytest.param(file, content, command, id=f"{file}: {name}")
        for files, contents, command in groups
        for file in files.split()
        for name, content in contents.items()
    ]


def changed(**texts):
    """Contents that differ from the good file in one value, given as JSON."""
    return {f"{key} = {text[:20]}": (key, text) for key, values in texts.items() for text in values}


STEERING = changed(
    strength=["null", '"x"', "NaN", "Infinity", "1e400", HUGE, "true", "[]", "{}"],
    alpha=["null", '"x"', "NaN", "2", "-1", HUGE, "[]"],
    penalty=["null", '"x"', "NaN", "1", "[]", HUGE],
    interval=["5", '"ab"', "[1]", "[1, 2, 3]", '["a", "b"]', "[NaN, 1]", "{}"],
    projection=["5", '"false"', "null"],
    direction=["5", '"raw"', "null", "[]", "{}"],
    vocab_size=['"x"', "3.5", "[]", HUGE],
    objective=["5", "[]"],
    verdict=["{}"],
)
ADAPTER = changed(
    r=['"x"', "null", "-1", "0", "3.5", HUGE, "[]", "{}"],
    lora_alpha=['"x"', "null", "[]"],
    peft_type=['"NOTHING"', "5", "null", "[]"],
    target_modules=["5", "{}", '["nothing"]', "[5]"],
    task_type=["5", "[]"],
    rank_pattern=["5", '{"q_proj": "x"}'],
)
CONFIG = changed(
    model_type=['"nothing"', "5", "null", "[]"],
    hidden_size=['"x"', "null", "-1", "0", "3.5", HUGE, "[]"],
    vocab_size=['"x"', "null", "-1", HUGE],
    num_hidden_layers=['"x"', "null", HUGE],
    num_attention_heads=["0", '"x"'],
    hidden_act=['"nothing"', "5"],
    rope_parameters=["5", "[]"],
    dtype=['"nothing"', "5"],
    quantization_config=["5"],
)


@pytest.mark.parametrize(
    "file, content, command",
    cases(
        ("adapter/steering_config.json", NO_OBJECT | STEERING, GENERATE),
        ("adapter/adapter_config.json", NO_OBJECT | ADAPTER, GENERATE + " --strength 1"),
        ("adapter/adapter_model.safetensors", WEIGHTS, GENERATE),
        ("base/model.safetensors", WEIGHTS, GENERATE),
        ("base/config.json", NO_OBJECT | CONFIG, GENERATE),
        ("base/tokenizer_config.json base/generation_config.json", NO_OBJECT, GENERATE),
        ("base/tokenizer.json", NO_OBJECT, GENERATE),
    ),
)
def test_models_and_adapters(run, place, file, content, command):
    path = place / file
    if isinstance(content, tuple):  # one value of the good file
        key, text = content
        values = json.loads(path.read_text()) | {key: "@"}
        content = json.dumps(values).replace('"@"', text).encode()
    path.write_bytes(content)
    result = run(*command.split())
    if file.endswith(("tokenizer_config.json", "generation_config.json")) and result[0] == 0:
        return
    refused(result, file.partition("/")[0])


def test_half_a_file_of_weights(run, place):
    for path in (place / "adapter/adapter_model.safetensors", place / "base/model.safetensors"):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        refused(run(*GENERATE.split()), path.name)
        path.write_bytes(whole)


SEEN = {
    "numbers": b'{"training": 5}',
    "lists": b'{"training": [[]]}',
    "null": b'{"training": null}',
    "no hashes": b'{"training": [5]}',
    "text": b'{"training": "abc"}',
}
QUESTION = {
    "question": "w020",
    "mc1_targets": {"w007": 1, "w009": 0},
    "mc2_targets": {"w007": 1, "w009": 0},
}
ITEMS = {k: v for k, v in NO_OBJECT.items() if k not in ("a list", "deep objects")} | {
    "deep inside": b'[{"question":' + b"[" * NESTED,
    "no array": b"{",
    "a list of numbers": b"[5]",
    "a list of lists": b"[[]]",
    "null inside": b"[null]",
}
QUESTIONS = {
    f"{key} = {value!r}": json.dumps([QUESTION | {key: value}]).encode()
    for key, value in (
        ("question", 5), ("question", None), ("question", ""), ("mc1_targets", []),
        ("mc1_targets", {"a": 2}), ("mc1_targets", {"a": [1]}), ("mc2_targets", {"a": "x"}),
        ("mc2_targets", 5), ("mc1_targets", {"": 1}), ("mc2_targets", {"w007": None}),
    )
}  # fmt: skip
PROBLEM = {
    "instruction": "w020\n\nAnswer format: answer1/answer2",
    "output": "the correct answer is answer1",
    "answer": "answer1",
}
PROBLEMS = {
    f"{key} = {value!r}": json.dumps([PROBLEM | {key: value}]).encode()
    for key, value in (
        ("instruction", 5), ("instruction", None), ("instruction", ""), ("output", 5),
        ("answer", []), ("answer", "answer3"), ("output", "answer1"), ("input", "x"),
    )
}  # fmt: skip
CSV = {
    "bytes": b"\x00\xff\xfe\x80",
    "no columns": b"a,b\n1,2\n",
    "a huge field": b"Question,Best Answer,Correct Answers,Incorrect Answers\n"
    + b"x" * 200_000 + b",b,b,c\n",
    "half a row": b"Question,Best Answer,Correct Answers,Incorrect Answers\na\n",
    "nothing": b"",
    "an open quote": b'Question,Best Answer,Correct Answers,Incorrect Answers\n"a,b,b,c\n',
}  # fmt: skip
LINES = {k: v for k, v in NO_OBJECT.items() if k not in ("a list", "cut", "deep objects")} | {
    "cut": b'{"prompt": \n'
}


@pytest.mark.parametrize(
    "file, content, command",
    cases(
        ("adapter/seen_prompts.json", NO_OBJECT | SEEN, CALIBRATE),
        ("train.jsonl", LINES, TRAIN),
        ("mc.json", ITEMS | QUESTIONS, TRUTHFULQA),
        ("questions.csv", CSV, TRUTHFULQA.replace("mc.json", "questions.csv")),
        ("problems.json", ITEMS | PROBLEMS, COMMONSENSE),
    ),
)
def test_data(run, place, file, content, command):
    (place / file).write_bytes(content)
    refused(run(*command.split()), file)
    assert not (place / "runs").exists() and not (place / "new").exists()


def result_line(**values):
    scores = {name: [-1.0, -2.0] for name in ("base", "adapted", "steered")}
    return {"id": 0, "question": "w022", "scores": scores} | values


RESULTS = {
    "5": "5",
    "null": "null",
    "a list": "[]",
    "deep": "[" * NESTED,
    "no id": json.dumps({"question": "w022", "scores": {}}),
    "id = 'x'": json.dumps(result_line(id="x")),
    "id = 99": json.dumps(result_line(id=99)),
    "id = -1": json.dumps(result_line(id=-1)),
    "id = true": json.dumps(result_line(id=True)),
    "id = []": json.dumps(result_line(id=[])),
    "id = null": json.dumps(result_line(id=None)),
    "no scores": json.dumps({"id": 0, "question": "w022"}),
    "scores = 5": json.dumps(result_line(scores=5)),
    "scores = {}": json.dumps(result_line(scores={})),
    **{
        f"a score of {text[:10]}": json.dumps(
            result_line(scores={n: ["@", -2.0] for n in ("base", "adapted", "steered")})
        ).replace('"@"', text)
        for text in ("null", "NaN", "-Infinity", '"x"', "[]", "true", HUGE, "1e400")
    },
    "a score too few": json.dumps(
        result_line(scores={n: [-2.0] for n in ("base", "adapted", "steered")})
    ),
    "another question": json.dumps(result_line(question="w999")),
    "question = 5": json.dumps(result_line(question=5)),
}


@pytest.mark.parametrize("line", RESULTS.values(), ids=RESULTS)
def test_journals(run, place, line):
    assert run(*TRUTHFULQA.split())[0] == 0
    path = place / "runs/truthfulqa.jsonl"
    head, first, *_ = path.read_text().splitlines()
    path.write_text(f"{head}\n{line.replace('w022', json.loads(first)['question'])}\n")
    table = (place / "runs/truthfulqa.json").read_bytes()
    refused(run(*TRUTHFULQA.split()), "runs/truthfulqa.jsonl:2")
    assert (place / "runs/truthfulqa.json").read_bytes() == table


HEADS = {
    "5": "5",
    "no fingerprint": "{}",
    "settings = 5": '{"fingerprint": 5, "settings": 5}',
    "deep": "[" * NESTED,
    "bytes": "\udcff",
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_heads_of_journals(run, place, head):
    (place / "runs").mkdir()
    (place / "runs/truthfulqa.jsonl").write_bytes(head.encode("utf-8", "surrogateescape") + b"\n")
    refused(run(*TRUTHFULQA.split()), "runs/truthfulqa.jsonl")


ANSWERS = {
    f"{key} = {value!r}": ANSWER | {key: value}
    for key, value in (
        ("question", 5), ("right", "x"), ("right", [5]), ("wrong", [None]), ("answers", []),
        ("answers", {}), ("answers", {"base": 5}), ("answers", {"base": None}), ("id", "x"),
        ("id", None), ("id", []),
    )
}  # fmt: skip


@pytest.mark.parametrize("line", ANSWERS.values(), ids=ANSWERS)
def test_answers(run, place, line):
    (place / "answers.jsonl").write_text(f"{json.dumps(ANSWER | {'id': 5})}\n{json.dumps(line)}\n")
    refused(run(*JUDGE.split()), "answers.jsonl:2")


@pytest.mark.parametrize(
    "head",
    ["5", '{"fingerprint": "f"}', '{"fingerprint": "f", "settings": 5}',
     '{"fingerprint": "f", "settings": {"questions": "x"}}'],
)  # fmt: skip
def test_heads_of_answers(run, place, head):
    (place / "answers.jsonl").write_text(f"{head}\n{json.dumps(ANSWER)}\n")
    refused(run(*JUDGE.split()), "answers.jsonl")


VERDICTS = {
    **{k: v for k, v in RESULTS.items() if k in ("5", "null", "a list", "deep")},
    "no key": '{"verdict": true}',
    "no verdict": '{"key": "a"}',
    **{
        f"verdict = {text[:10]}": f'{{"key": "a", "verdict": {text}}}'
        for text in ("null", "5", "NaN", '"no"', "[]", "{}", HUGE)
    },
    "key = 5": '{"key": 5, "verdict": true}',
    "key = []": '{"key": [], "verdict": true}',
}


@pytest.mark.parametrize("line", VERDICTS.values(), ids=VERDICTS)
def test_verdicts(run, place, line):
    (place / "answers.verdicts.jsonl").write_text(line + "\n")
    refused(run(*JUDGE.split()), "answers.verdicts.jsonl:1")
    assert not (place / "answers.json").exists()


OPTIONS = [
    (GENERATE, "--device", ["cuda", "cuda:1", "foo", "cpu:x", "", "meta", "cuda:99999999999999"]),
    (GENERATE, "--dtype", ["float8", "foo", "", "int8", "float8_e4m3fn", "torch.int8", "nn"]),
    (TRAIN, "--dtype", ["float8", "foo"]),
    (TRAIN, "--device", ["cuda", "foo"]),
    (CALIBRATE, "--dtype", ["float8"]),
    (CALIBRATE, "--device", ["cuda", "foo"]),
    (TRUTHFULQA, "--device", ["cuda"]),
    (COMMONSENSE, "--dtype", ["float8"]),
    (GENERATE, "--temperature", ["nan", "inf", "-1"]),
    (GENERATE, "--top-p", ["nan", "0", "2"]),
    (GENERATE, "--min-p", ["nan", "2"]),
    (GENERATE, "--top-k", ["-1"]),
    (GENERATE, "--strength", ["nan", "inf", "1e400"]),
    (GENERATE, "--alpha", ["nan", "inf", "2"]),
    (GENERATE, "--max-new-tokens", [HUGE, "-1", "500"]),
    (GENERATE, "--beams", [HUGE, "0", "-1"]),
    (GENERATE, "-n", [HUGE, "0", "2"]),
    (GENERATE, "--repetition-penalty", ["nan", "0"]),
    (GENERATE, "--length-penalty", ["nan"]),
    (GENERATE + " --temperature 1", "--seed", [HUGE]),
    (TRAIN, "--epochs", ["nan", "inf", "-1", "0"]),
    (TRAIN, "--steps", ["0", "-1"]),
    (TRAIN, "--learning-rate", ["nan", "inf", "1e400", "-1", "0", "fast", ""]),
    (TRAIN, "--lora-alpha", ["nan", "inf", "0"]),
    (TRAIN, "--dropout", ["nan", "1", "-1"]),
    (TRAIN, "--rank", ["0", "-1", HUGE]),
    (TRAIN + " --method prompt", "--virtual-tokens", ["0", HUGE]),
    (TRAIN, "--batch-size", ["0", "-1"]),
    (TRAIN, "--accumulation", ["0"]),
    (TRAIN, "--checkpoint-every", ["0", "-1"]),
    (TRAIN, "--max-length", ["0", "-1"]),
    (TRAIN, "--seed", ["-1", HUGE]),
    (TRAIN, "--method", ["foo", ""]),
    (CALIBRATE, "--folds", ["0", "1", "7", HUGE]),
    (CALIBRATE, "--seed", ["-1"]),
    (CALIBRATE, "--alpha", ["nan", "0", "2", "-1"]),
    (CALIBRATE, "--objective", ["foo", ""]),
    (CALIBRATE, "--estimator", ["foo"]),
    (CALIBRATE, "--hessian", ["foo"]),
    (TRUTHFULQA, "--strength", ["nan", "inf"]),
    (TRUTHFULQA, "--batch-size", ["0", "-1"]),
    (TRUTHFULQA, "--limit", ["0"]),
    (TRUTHFULQA, "--prompt", ["foo"]),
    (COMMONSENSE, "--by", ["foo"]),
    (COMMONSENSE, "--task", ["foo"]),
    (COMMONSENSE + " --by generation", "--max-new-tokens", ["-1", HUGE]),
    (OPEN, "--max-new-tokens", ["-1", HUGE]),
    ("evaluate split truthfulqa parts --data mc.json", "--calibration", ["0", HUGE]),
]

# too many for its context
OF_THE_MODEL = {("--max-new-tokens", HUGE), ("--max-new-tokens", "500"), ("--beams", HUGE)}


@pytest.mark.parametrize(
    "command, option, value",
    [
        pytest.param(command, option, value, id=f"{command.split()[0]} {option} {value[:20]}")
        for command, option, values in OPTIONS
        for value in values
    ],
)
def test_options(run, place, monkeypatch, command, option, value):
    if option not in ("--device", "--dtype") and (option, value) not in OF_THE_MODEL:
        monkeypatch.setattr("svd_engine.loading.load_base", lambda *_, **__: pytest.fail("loaded"))
    before = sorted(place.rglob("*"))
    words = option.strip("-").replace("-", "_")
    _code, _, err = result = run(*command.split(), option, value)
    refused(result)
    named = {"n": "num_return_sequences", "beams": "num_beams"}.get(words, words)
    assert named in err.replace("-", "_"), err
    assert sorted(place.rglob("*")) == before


PATHS = [
    (TRAIN.replace(" new ", " train.jsonl/new "), "train.jsonl"),
    (TRAIN.replace(" new ", " train.jsonl "), "train.jsonl"),
    (TRAIN.replace(" new ", " train.jsonl --overwrite "), "train.jsonl"),
    (TRAIN.replace(" new ", " base --overwrite "), "base"),
    (TRAIN.replace(" new ", " . "), "output"),
    (TRAIN.replace(" new ", " .. --overwrite "), "output"),
    (TRAIN.replace(" new ", " / --overwrite "), "output"),
    (TRAIN.replace(" new ", f" {'x' * 300} "), "x" * 50),
    (TRAIN.replace(" train.jsonl ", " base "), "base"),
    (TRAIN.replace(" train.jsonl ", f" {'x' * 300} "), "x" * 50),
    (CALIBRATE.replace(" adapter ", " train.jsonl "), "train.jsonl"),
    (CALIBRATE.replace(" adapter ", " base "), "base"),
    (CALIBRATE.replace(" calibration.jsonl ", " adapter "), "adapter"),
    (GENERATE.replace(" w005 ", " ") + " --file base", "base"),
    (GENERATE.replace("--adapter adapter", "--adapter ./train.jsonl"), "train.jsonl"),
    (GENERATE.replace("--base base", "--base ./train.jsonl"), "train.jsonl"),
    (GENERATE.replace("--base base", "--base adapter"), "adapter"),
    (TRUTHFULQA.replace("--output runs", "--output mc.json"), "mc.json"),
    (TRUTHFULQA.replace("--output runs", "--output mc.json/runs"), "mc.json"),
    (TRUTHFULQA.replace("--data mc.json", "--data base"), "base"),
    (TRUTHFULQA.replace("--output runs", "--output /dev/full"), "/dev/full"),
    (COMMONSENSE.replace("--data problems.json", "--data base"), "base"),
    ("evaluate split truthfulqa mc.json --data mc.json --calibration 1", "mc.json"),
    ("evaluate split truthfulqa mc.json/x --data mc.json --calibration 1", "mc.json"),
    ("evaluate judge base", "base"),
    ("demo --folder train.jsonl", "train.jsonl"),
]


@pytest.mark.parametrize("command, named", PATHS, ids=[command[:90] for command, _ in PATHS])
def test_paths(run, place, command, named):
    before = {path: path.is_file() and path.read_bytes() for path in place.rglob("*")}
    refused(run(*command.split()), named)
    assert {path: path.is_file() and path.read_bytes() for path in place.rglob("*")} == before
