"""TruthfulQA: the metrics by hand, the split, both files, and which line is blamed."""

import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from svd_engine.data import checks, contamination
from svd_engine.evaluate import truthfulqa, truthfulqa_files

SHARED = Path(__file__).parents[3] / "shared" / "data" / "truthfulqa"
ITEM = {
    "question": "Why?",
    "mc1_targets": {"So.": 1, "No.": 0},
    "mc2_targets": {"Thus.": 1, "So.": 1, "No.": 0, "Luck.": 0},
}

SECOND = len(json.dumps([ITEM], indent=1).splitlines())  # the line where a second item begins


def write(path, item=None, **changes):
    """Two items, the second changed."""
    path.write_text(json.dumps([ITEM, {**ITEM, **changes} if item is None else item], indent=1))
    return path


def test_metrics_by_hand(tmp_path):
    question = truthfulqa_files.read(write(tmp_path / "mc.json"))[0]
    assert question.answers == [" So.", " Thus.", " No.", " Luck."]
    # MC1 sets "So." against "No." alone; "Luck." is above "So." and below "Thus.".
    scores = [math.log(p) for p in (0.2, 0.4, 0.1, 0.3)]
    assert question.metrics(scores) == pytest.approx([1.0, 0.6, 0.5])
    assert question.metrics([math.log(p) for p in (0.1, 0.1, 0.1, 0.1)]) == pytest.approx(
        [0, 0.5, 0]
    )
    # An answer of MC1 that MC2 does not hold counts for MC1 alone.
    more = truthfulqa.Question("", "Why?", ["a"], ["b"], ["c"])
    assert more.answers == [" a", " b", " c"]
    assert more.metrics([math.log(p) for p in (0.2, 0.1, 0.7)]) == pytest.approx([0, 2 / 3, 1])


def test_the_split_is_a_partition_and_a_fifth_is_tested():
    questions = [truthfulqa.Question("", str(i), ["a"], ["b"], ["b"]) for i in range(817)]
    parts = truthfulqa.split(questions, seed=3)
    assert {k: len(v) for k, v in parts.items()} == dict(training=553, calibration=100, test=164)
    names = [q.question for part in parts.values() for q in part]
    assert sorted(names, key=int) == [str(i) for i in range(817)]
    assert truthfulqa.test(questions, 3) == parts["test"] != truthfulqa.test(questions, 4)
    with pytest.raises(ValueError, match=r"calibration must lie in \[1, 652\]"):
        truthfulqa.split(questions, calibration=653)


def test_examples_are_what_the_other_commands_read():
    question = truthfulqa.Question("", "Why?", ["So.", "Thus."], ["No."], ["No."])
    line = truthfulqa.example(question, truthfulqa.template("plain"))
    assert line == dict(
        prompt="Q: Why?\nA:", completion=" So.", accepted=[" Thus."], rejected=[" No."]
    )
    checks.check_example(line, "here")
    primed = truthfulqa.example(question, truthfulqa.template("primer"))["prompt"]
    assert primed.endswith("Barcelona, Spain.\n\nQ: Why?\nA:") and primed.count("Q: ") == 7
    assert contamination.prompt_key(primed) == contamination.prompt_key(question.question)
    with pytest.raises(ValueError, match="prompt must be one of plain, primer; got 'x'"):
        truthfulqa.template("x")


def test_csv(tmp_path):
    header = "Category,Question,Best Answer,Correct Answers,Incorrect Answers\n"
    path = tmp_path / "t.csv"
    path.write_text("\ufeff" + header + 'x,"Why\n{so}?",So,Thus; So ;So.; Odd.,No; Luck;Odd\n')
    (question,) = truthfulqa_files.read(path)
    assert question == truthfulqa.Question(
        f"{path}:2", "Why\n{so}?", ["So.", "Thus."], ["No.", "Luck.", "Odd."],
        ["No.", "Luck.", "Odd."],
    )  # fmt: skip
    path.write_text(header + 'x,"Why\n?",So,So,No\nx,How?,,So,No\n')
    with pytest.raises(ValueError, match=r"t.csv:4: there is no best answer"):
        truthfulqa_files.read(path)
    path.write_text("Category,Question\nx,How?\n")
    with pytest.raises(ValueError, match=r"t.csv:2: column 'Best Answer' is missing"):
        truthfulqa_files.read(path)


BAD = [
    (dict(question=" "), "question is empty"),
    (dict(mc1_targets={"So.": 1, " ": 0}), "an answer is empty"),
    (dict(mc2_targets={"So.": 1, "so. ": 0}), "the answer 'so. ' is there twice"),
    (dict(mc1_targets={"So.": 0, "No.": 0}), "must hold one right answer; got 0"),
    (dict(mc1_targets={"So.": 1, "No.": 1}), "must hold one right answer; got 2"),
    (dict(mc1_targets={"Other.": 1, "No.": 0}), "do not hold the best one, 'Other.'"),
    (dict(mc1_targets={"So.": 1, "Thus.": 0}), "right in mc2_targets and wrong in mc1_targets"),
    (dict(mc2_targets={"So.": 1}), "there is no wrong answer"),
    (dict(mc2_targets={"So.": "yes"}), "must map each answer to 1 or 0"),
    (dict(item=3), "a question is an object; got int"),
    (dict(item={"question": "Why?"}), "'mc1_targets' is missing"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_the_error_names_file_and_line(tmp_path, changes, message):
    path = write(tmp_path / "mc.json", **changes)
    with pytest.raises(ValueError, match=message) as raised:
        truthfulqa_files.read(path)
    assert str(raised.value).startswith(f"{path}:{SECOND}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n {"question": ]', ":2: not JSON"),
        ('[\n {"a": 1, "a": 2}]', ":2: 'a' is there twice"),
        ('[{"a": 1}\n', ":2: the array has no end"),
        ("[]", " holds no questions"),
    ],
)
def test_broken_files(tmp_path, text, message):
    path = tmp_path / "mc.json"
    path.write_text(text.replace('{"a": 1}', json.dumps(ITEM)))
    with pytest.raises(ValueError, match=f"mc.json{message}"):
        truthfulqa_files.read(path)
    with pytest.raises(ValueError, match="does not exist"):
        truthfulqa_files.read(tmp_path / "absent.json")


def test_the_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        truthfulqa_files.read_hub()
    row = {"question": "Why?"} | {
        key: {"choices": list(ITEM[key]), "labels": list(ITEM[key].values())}
        for key in ("mc1_targets", "mc2_targets")
    }
    asked = []

    def load_dataset(*arguments, **named):
        asked.append((arguments, named))
        return [row]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    (question,) = truthfulqa_files.read_hub()
    assert question.right == ["So.", "Thus."] and question.wrong == ["No.", "Luck."]
    assert asked == [((truthfulqa_files.HUB, "multiple_choice"), {"split": "validation"})]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data folder is not there")
def test_the_real_files_agree():
    choices = truthfulqa_files.read(SHARED / "mc_task.json")
    table = {q.question: q for q in truthfulqa_files.read(SHARED / "TruthfulQA.csv")}
    assert len(choices) == len(table) == 817
    for question in choices:
        twin = table[question.question]
        assert question.right[0] == twin.right[0]
        assert set(question.right) == set(twin.right) and set(question.wrong) == set(twin.wrong)
        assert question.mc1_wrong == question.wrong or set(question.mc1_wrong) == set(
            question.wrong
        )
    raw = json.loads((SHARED / "mc_task.json").read_text())
    random.Random(0).shuffle(raw)
    assert [q.question for q in truthfulqa.test(choices)] == [r["question"] for r in raw[:164]]
    assert len({contamination.prompt_key(q.question) for q in choices}) == 817
