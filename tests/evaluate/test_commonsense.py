"""The commonsense tasks: what is read, what is right, which line is blamed."""

import json
from pathlib import Path

import pytest

from svd_engine.data import checks, contamination
from svd_engine.evaluate import commonsense

SHARED = Path(__file__).parents[3] / "shared" / "data" / "commonsense"


def item(number=0, labels=("answer1", "answer2", "answer3"), answer="answer2", **changes):
    return {
        "instruction": f"Please choose the correct answer to the question: Is it {number}?\n\n"
        f"Answer1: yes Answer2: no\n\nAnswer format: {'/'.join(labels)}",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    } | changes


def write(path, items):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(items, indent=4))
    return path


def test_likelihood_by_hand(tmp_path):
    (problem,) = commonsense.read(write(tmp_path / "test.json", [item()]))
    assert problem.answers == [f"the correct answer is answer{i}" for i in (2, 1, 3)]
    assert problem.metrics([-1.0, -2.0, -3.0]) == [1.0]
    assert problem.metrics([-2.0, -1.0, -3.0]) == [0.0]
    assert problem.metrics([-1.0, -1.0, -3.0]) == [0.0]  # a tie is no answer
    line = commonsense.example(problem)
    assert line["prompt"].endswith("answer1/answer2/answer3\n\n### Response:\n")
    assert line["completion"] == problem.answers[0] and line["rejected"] == problem.answers[1:]
    checks.check_example(line, "here")


@pytest.mark.parametrize(
    ("text", "judged"),
    [
        ("the correct answer is answer2", [1, 1]),
        ("Answer2.", [1, 1]),
        ("answer1, not answer2", [0, 1]),
        ("answer22 or none", [0, 0]),
        ("the correct answer is answer2assistant", [1, 1]),
        ("", [0, 0]),
    ],
)
def test_generation_by_hand(tmp_path, text, judged):
    (problem,) = commonsense.read(write(tmp_path / "test.json", [item()]))
    assert problem.judged(text) == judged


def test_true_is_not_in_untrue(tmp_path):
    (problem,) = commonsense.read(
        write(tmp_path / "test.json", [item(labels=("true", "false"), answer="true")])
    )
    assert problem.judged("That is untrue, so False") == [0.0, 1.0]


@pytest.mark.parametrize("label", ["solution", "ending", "option", "answer"])
def test_every_label(tmp_path, label):
    labels = tuple(f"{label}{i}" for i in range(1, 5))
    (problem,) = commonsense.read(
        write(tmp_path / "test.json", [item(labels=labels, answer=labels[3])])
    )
    assert problem.options == [labels[3], *labels[:3]]


def test_find(tmp_path):
    path = write(tmp_path / "ARC-Easy" / "test.json", [item()])
    assert commonsense.find(tmp_path, "arc-easy", "test") == path
    assert commonsense.find(tmp_path / "ARC-Easy", "arc-easy", "test") == path
    assert commonsense.find(path, "arc-easy", "test") == path
    with pytest.raises(ValueError, match=r"holds neither boolq/test.json nor test.json"):
        commonsense.find(tmp_path, "boolq", "test")
    with pytest.raises(ValueError, match=r"task must be one of boolq, .*got 'arc'"):
        commonsense.find(tmp_path, "arc", "test")


def test_the_split_leaves_out_what_the_test_holds(tmp_path):
    # "Is it 0?" to "Is it 9?", one of them twice, one of them in the test in other letters.
    train = [item(i) for i in (*range(10), 4)]
    tested = item(7)
    tested["instruction"] = tested["instruction"].replace("Is it", "is  IT,")
    train, test = (
        commonsense.read(write(tmp_path / name, rows))
        for name, rows in (("train.json", train), ("test.json", [tested]))
    )
    parts = commonsense.split(train, test, seed=1, calibration=3)
    assert [len(parts[k]) for k in ("training", "calibration", "test")] == [6, 3, 1]
    keys = [contamination.prompt_key(p.question) for part in parts.values() for p in part]
    assert len(set(keys)) == 10
    assert parts == commonsense.split(train, test, seed=1, calibration=3)
    with pytest.raises(ValueError, match=r"calibration must lie in \[1, 8\]"):
        commonsense.split(train, test, calibration=9)


BAD = [
    (dict(instruction=""), "instruction is empty"),
    (dict(instruction="Is it?"), "must end with a line 'Answer format"),
    (dict(instruction="Is it?\n\nAnswer format: answer2"), "two options at least"),
    (
        dict(instruction="Is it?\n\nAnswer format: answer2/"),
        "an option of the answer format is empty",
    ),
    (dict(instruction="Is it?\n\nAnswer format: answer2/Answer2"), "'Answer2' is there twice"),
    (dict(answer="answer4"), "the right answer 'answer4' is not among"),
    (dict(output="answer2"), "output must be 'the correct answer is answer2'; got 'answer2'"),
    (dict(input="more"), "input must be empty"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_the_error_names_file_and_line(tmp_path, changes, message):
    path = write(tmp_path / "test.json", [item(), item(1, **changes)])
    with pytest.raises(ValueError, match=message) as raised:
        commonsense.read(path)
    assert str(raised.value).startswith(f"{path}:8: ")


def test_what_is_no_problem(tmp_path):
    for items, message in (([3], "a problem is an object"), ([{}], "'instruction' is missing")):
        with pytest.raises(ValueError, match=f"test.json:2: {message}"):
            commonsense.read(write(tmp_path / "test.json", items))
    with pytest.raises(ValueError, match="holds no problems"):
        commonsense.read(write(tmp_path / "test.json", []))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data folder is not there")
@pytest.mark.parametrize(
    ("task", "train", "test"),
    [("boolq", 9427, 3270), ("arc-easy", 2251, 2376), ("obqa", 4957, 500)],
)
def test_the_real_files(task, train, test):
    problems = [
        commonsense.read(commonsense.find(SHARED, task, part)) for part in ("train", "test")
    ]
    assert [len(part) for part in problems] == [train, test]
    parts = commonsense.split(*problems)
    assert len(parts["test"]) == test and len(parts["training"]) > 0.7 * (train - 500)
    wanted = {2} if task == "boolq" else {3, 4, 5} if task == "arc-easy" else {4}
    assert {len(problem.options) for problem in problems[1]} == wanted
