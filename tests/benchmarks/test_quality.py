"""The quality experiments on a tiny model: stored passes say what the operators say."""

import json

import numpy as np
import pytest

from benchmarks.quality import ablations, measure, objectives, plots, tables, tasks, work
from benchmarks.quality.__main__ import DATA
from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.calibration.calibrate import Answers
from svd_engine.data.examples import encode
from svd_engine.evaluate.truthfulqa import Question
from svd_engine.generation import scoring
from tests.tiny import tiny_peft


@pytest.fixture(scope="module")
def engine():
    return SteeredEngine(tiny_peft(), pairing="paired")


def part(seed, count=6):
    """Questions whose answers are random tokens."""
    rng = np.random.default_rng(seed)

    def ids(n):
        return rng.integers(3, 211, n).tolist()

    rows = [
        {
            "prompt": ids(4), "completion": ids(3), "accepted": [ids(2)],
            "rejected": [ids(2), ids(4)],
        }
        for _ in range(count)
    ]  # fmt: skip
    made = tasks.Part.__new__(tasks.Part)
    made.items = [
        Question(f"row {i}", f"q{i}", ["a", "b"], ["c", "d"], ["c", "d"]) for i in range(count)
    ]
    made.rows, made.answers = rows, Answers(encode(rows, None))
    return made


@pytest.fixture(scope="module")
def made(engine, tmp_path_factory):
    """A task and its two passes."""
    task = tasks.Task("tiny", ("MC1", "MC2", "MC3", "average"), [], part(0), part(1))
    folder = tmp_path_factory.mktemp("passes")
    passes = []
    for name in ("calibration", "test"):
        path = folder / f"{name}.pt"
        work._make(engine, getattr(task, name), path, name)
        passes.append(work._read(path))
    return task, *passes


def scored(engine, answers, strength, alpha, penalty=0.0):
    return scoring.score(engine.pair, answers.passages, SteeringConfig(strength, alpha), penalty)


def test_a_pass_scores_as_the_operators_do(engine, made):
    task, _, test = made
    answers = task.test.answers
    kept = answers.scores(test.entries.at(0.1), -4.0)
    assert kept == pytest.approx(scored(engine, answers, -4.0, 0.1), rel=1e-4, abs=1e-4)
    column = work.WHOLE.index(-4.0)
    whole = scored(engine, answers, -4.0, 0.0)
    assert test.whole[:, column].tolist() == pytest.approx(whole, rel=1e-4, abs=1e-4)
    # z + mu g at mu = 1 is the base alone, at mu = 0 the adapted model.
    totals = test.entries.totals(test.entries.base, len(answers.passages))
    base, adapted = (test.raw[:, work.RAW.index(mu)] for mu in (1.0, 0.0))
    assert base.tolist() == pytest.approx(totals.tolist(), rel=1e-4, abs=1e-4)
    assert adapted.tolist() == pytest.approx(answers.scores(test.entries, 0.0).tolist(), rel=1e-4)


def test_the_penalty_is_the_operators(engine, made, monkeypatch):
    task, _, test = made
    monkeypatch.setattr(ablations, "PENALTY", -3.0)
    found = ablations.penalised(task.test, test.entries.at(0.1), -2.0)
    truth = scored(engine, task.test.answers, -2.0, 0.1, -3.0)
    assert found == pytest.approx(truth, rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_the_tables_take_what_is_measured(made, tmp_path):
    task, *passes = made
    case, models = measure.worth(task, *passes)
    case |= {
        "seed": 0, "method": "lora", "steps": 30, "task": "tiny", "batch_size": 4,
        "objectives": objectives.compared(task, *passes),
        "nll": measure.likelihood(task, *passes),
    }  # fmt: skip
    case = json.loads(json.dumps(case))
    assert case["gain"]["average"]["mean"] == pytest.approx(
        (models["steered"] - models["adapted"])[:, -1].mean()
    )
    steered = case["calibration"]["strength"], case["models"]["steered"]["average"]["mean"]
    assert case["estimators"]["optimum"] == {"mu": steered[0], "figure": pytest.approx(steered[1])}
    about = {
        "model": "Tiny", "machine": "Some CPU", "date": "2026-01-31", "command": "make quality",
        "versions": {"transformers": "5.1", "peft": "0.2", "svd-engine": "0.3"},
    }  # fmt: skip
    names = tuple(each["objective"] for each in case["objectives"])
    changes = np.array([each.pop("changes") for each in case["objectives"]]).T
    main = about | {
        "cases": [case], "mean_gain": case["gain"],
        "objective_gain": measure.summary(names, changes),
    }  # fmt: skip
    for form in (tables.truthfulqa, tables.objectives, tables.estimators, tables.likelihood):
        assert "LoRA" in form(main)
    assert "30" in tables.steps(main)
    for cases, form in (
        (ablations.variants(task, *passes), tables.ablations),
        (ablations.alphas(task, *passes), tables.alphas),
    ):
        text = form(about | {"cases": [{"method": "lora"} | case for case in cases]})
        assert text.count("\n| ") == len(cases) + 2
    for name in ("truthfulqa", "steps"):
        (tmp_path / f"quality_{name}.json").write_text(json.dumps(main))
    assert len(plots.draw(tmp_path)) == 3


def test_a_larger_alpha_keeps_fewer_tokens(made):
    tokens = [case["tokens"] for case in ablations.alphas(*made)]
    assert tokens == sorted(tokens, reverse=True) and tokens[-1] >= 1


def test_the_split_keeps_the_parts_apart(monkeypatch, words):
    if not (DATA / "truthfulqa").is_dir():
        pytest.skip("the questions of TruthfulQA are not there")
    monkeypatch.setattr(tasks, "tokenizer", lambda: words)
    task = tasks.truthfulqa_split(DATA, 1)
    prompts = [
        {row["prompt"] for row in rows}
        for rows in (task.training, task.calibration.rows, task.test.rows)
    ]
    assert [len(p) for p in prompts] == [403, 250, 164]
    assert len(set.union(*prompts)) == 817
