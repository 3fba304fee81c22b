"""The quality experiments on a tiny model: stored passes say what the operators say."""

import json

import numpy as np
import pytest

from benchmarks.quality import ablations, choices, measure, plots, tables, tasks, work
from benchmarks.quality.__main__ import DATA
from benchmarks.quality.experiments import Place, each, pooled, summarised
from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.calibration.calibrate import Answers
from svd_engine.data.examples import encode
from svd_engine.evaluate.truthfulqa import Question
from svd_engine.generation import scoring
from tests.tiny import tiny_peft


@pytest.fixture(scope="module")
def engine():
    return SteeredEngine(tiny_peft())


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
    found = []
    for name in ("calibration", "test"):
        path = folder / f"{name}.pt"
        work.make(engine.pair, getattr(task, name), path, name)
        found.append(work.read(path))
    return task, work.Passes(*found)


def scored(engine, answers, strength, alpha, penalty=0.0):
    return scoring.score(engine.pair, answers.passages, SteeringConfig(strength, alpha), penalty)


def test_a_pass_scores_as_the_operators_do(engine, made):
    task, passes = made
    answers = task.test.answers
    kept = answers.scores(passes.test.at(0.1), -4.0)
    assert kept == pytest.approx(scored(engine, answers, -4.0, 0.1), rel=1e-4, abs=1e-4)


def test_the_whole_vocabulary_scores_as_the_operators_do(engine, made):
    task, passes = made
    answers = task.test.answers
    found = ablations.over_vocabulary(engine.pair, task.test)
    strengths = ablations.STRENGTHS
    whole = found["without the mask"][:, strengths["without the mask"].index(-4)]
    truth = scored(engine, answers, -4.0, 0.0)
    assert whole.tolist() == pytest.approx(truth, rel=1e-4, abs=1e-4)
    # z + mu g at mu = 1 is the base alone, at mu = 0 the adapted model.
    raw, name = found["without the projection"], "without the projection"
    base, adapted = (raw[:, strengths[name].index(mu)].tolist() for mu in (1, 0))
    totals = passes.test.totals(passes.test.base, len(answers.passages))
    assert base == pytest.approx(totals.tolist(), rel=1e-4, abs=1e-4)
    assert adapted == pytest.approx(answers.scores(passes.test, 0.0).tolist(), rel=1e-4)


def test_the_penalty_is_the_operators(engine, made, monkeypatch):
    task, passes = made
    monkeypatch.setattr(ablations, "PENALTY", -3.0)
    found = ablations.penalised(task.test, passes.test.at(0.1), -2.0)
    truth = scored(engine, task.test.answers, -2.0, 0.1, -3.0)
    assert found == pytest.approx(truth, rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_the_tables_take_what_is_measured(engine, made, tmp_path, monkeypatch):
    task, passes = made
    report = measure.calibrated(task, passes)
    case, models = measure.worth(task, passes, report)
    projected = ablations.calibrated(task, passes)
    case |= {
        "fold": 0, "seed": 0, "method": "lora", "steps": 30, "task": "tiny", "batch_size": 4,
        "choices": choices.judged(task, passes, report),
        "nll": measure.likelihood(task, passes),
    } | measure.estimators(task, passes, projected)  # fmt: skip
    case = json.loads(json.dumps(case))
    gain = (models["steered"] - models["adapted"])[:, -1]
    assert case["gain"]["average"]["mean"] == pytest.approx(gain.mean())
    advised, auto, *others = case["choices"]
    assert auto["changes"] == pytest.approx(gain.tolist()) and auto["mu"] == report.strength
    assert advised["mu"] == (report.strength if report.worthwhile else 0)
    paper = next(each for each in others if each["name"] == choices.PAPER)
    assert paper["mu"] == pytest.approx(np.clip(
        ablations.calibrated(task, passes, (0.1,)).estimates["mean gauss-newton"], -64, 64
    ))  # fmt: skip
    optimum = case["estimators"]["optimum"]
    assert optimum["mu"] == projected.strength
    about = {
        "model": "Tiny", "machine": "Some CPU", "date": "2026-01-31", "command": "make quality",
        "versions": {"transformers": "5.1", "peft": "0.2", "svd-engine": "0.3"},
    }  # fmt: skip
    main = about | summarised([case], [(0, 0)], [[models["steered"] - models["adapted"]]])
    assert main["choice_gain"]["auto"]["mean"] == pytest.approx(gain.mean())
    for form in (tables.truthfulqa, tables.choices, tables.estimators, tables.likelihood):
        assert "LoRA" in form(main)
    assert "30" in tables.steps(main)
    unmasked = [ablations.over_vocabulary(engine.pair, p) for p in (task.calibration, task.test)]
    monkeypatch.setattr(ablations, "unmasked", lambda *_: unmasked)
    for cases, form in (
        (ablations.variants(task, passes, tmp_path), tables.ablations),
        (ablations.alphas(task, passes, tmp_path), tables.alphas),
    ):
        text = form(about | {"cases": [{"method": "lora"} | case for case in cases]})
        assert text.count("\n| ") == len(cases) + 2
    for name in ("truthfulqa", "steps"):
        (tmp_path / f"quality_{name}.json").write_text(json.dumps(main))
    assert len(plots.draw(tmp_path)) == 3


def test_questions_are_pooled_over_folds_and_averaged_over_methods_and_seeds():
    first = [np.full((3, 2), float(k)) for k in range(4)], [np.full((2, 2), 10.0)] * 4
    again = [np.full((3, 2), 5.5)] * 4, [np.full((2, 2), 20.0)] * 4
    found = pooled([0, 1, 0, 1], [*first, *again]).tolist()
    assert found == [[3.5, 3.5]] * 3 + [[15.0, 15.0]] * 2


def negated(place, part):
    return -part


def test_parts_are_measured_in_order_in_one_process_or_in_several():
    for jobs in (1, 2):
        assert each(Place(DATA, "cpu", jobs), negated, [1, 2, 3]) == [-1, -2, -3]


def test_a_larger_alpha_keeps_fewer_tokens(made):
    tokens = [case["tokens"] for case in ablations.alphas(*made, None)]
    assert tokens == sorted(tokens, reverse=True) and tokens[-1] >= 1


def test_every_question_is_in_the_test_of_one_fold(monkeypatch, words):
    if not (DATA / "truthfulqa").is_dir():
        pytest.skip("the questions of TruthfulQA are not there")
    monkeypatch.setattr(tasks, "tokenizer", lambda: words)
    tested = []
    for fold in range(tasks.FOLDS):
        task = tasks.truthfulqa_fold(DATA, fold)
        prompts = [
            {row["prompt"] for row in rows}
            for rows in (task.training, task.calibration.rows, task.test.rows)
        ]
        assert len(prompts[1]) == 250 and len(set.union(*prompts)) == sum(map(len, prompts)) == 817
        tested += list(prompts[2])
    assert len(tested) == len(set(tested)) == 817
