"""Scores and answers equal plain forward passes; a killed run goes on to the same numbers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.evaluate import report, run, settings
from svd_engine.evaluate.journal import Journal
from svd_engine.evaluate.truthfulqa import Question
from svd_engine.kernels import reference
from tests.tiny import tiny_peft

QUESTIONS = [
    Question(
        f"mc.json:{i}", f"w{20 + i:03} w{30 + i:03}", ["w007 w008", "w011"], ["w009"], ["w009"]
    )
    for i in range(5)
]
TEMPLATE = "w005 {question} w006"


@pytest.fixture(scope="module")
def engine(words):
    return SteeredEngine(tiny_peft(), words, SteeringConfig(-3.0, alpha=0.05))


def journal(path, engine, overwrite=False, **more):
    return Journal(
        path, settings.collect(engine, "ranking", QUESTIONS, task="test", **more), overwrite
    )


@torch.no_grad()
def plain_scores(engine, model, prompt, answer, name):
    """Plain PEFT, adapter on and off, the whole sequence at once."""
    ids = [int(word[1:]) for word in f"{prompt} {answer}".split()]
    start = len(prompt.split())
    adapted = model(torch.tensor([ids])).logits[0, start - 1 : -1].double()
    with model.disable_adapter():
        base = model(torch.tensor([ids])).logits[0, start - 1 : -1].double()
    logits = {
        "base": base,
        "adapted": adapted,
        "steered": reference.steer(adapted, base, -3.0, alpha=0.05, penalty=0.0),
    }[name]
    return float(logits.log_softmax(-1)[torch.arange(len(ids) - start), ids[start:]].sum())


def test_scores_equal_plain_forward_passes(engine, tmp_path):
    got = run.by_likelihood(engine, QUESTIONS, TEMPLATE, journal(tmp_path / "j", engine), 2)
    assert list(got) == ["base", "adapted", "steered"]
    for name, each in got.items():
        for question, scores in zip(QUESTIONS, each, strict=True):
            prompt = TEMPLATE.format(question=question.question)
            wanted = [plain_scores(engine, engine.model, prompt, a, name) for a in question.answers]
            assert scores == pytest.approx(wanted, abs=2e-4)


def test_answers_equal_generate(engine, tmp_path):
    got = run.by_generation(
        engine, QUESTIONS, TEMPLATE, journal(tmp_path / "j", engine), 2, 6,
        more=lambda question: {"right": question.right},
    )  # fmt: skip
    prompts = [TEMPLATE.format(question=q.question) for q in QUESTIONS]
    for name, texts in got.items():
        alone = engine.generate(prompts, model=name, max_new_tokens=6)
        assert texts == [completion.text for completion in alone]
    line = json.loads((tmp_path / "j").read_text().splitlines()[1])
    assert line["right"] == QUESTIONS[0].right and line["question"] == QUESTIONS[0].question
    assert set(line["answers"]) == {"base", "adapted", "steered"}


@pytest.mark.parametrize("lines", [1, 2, 4])
@pytest.mark.parametrize("torn", ["", '{"id": 3, "sco'])
def test_a_killed_evaluation_goes_on_to_the_same_file(engine, tmp_path, monkeypatch, lines, torn):
    """Cut after some lines, in the middle of a batch or of a line, the rest is what it was."""
    path = tmp_path / "j"
    first = run.by_likelihood(engine, QUESTIONS, TEMPLATE, journal(path, engine), 2)
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:lines]) + torn)
    asked = []
    scores = run._scores
    monkeypatch.setattr(run, "_scores", lambda e, p: (asked.append(len(p)), scores(e, p))[1])
    assert run.by_likelihood(engine, QUESTIONS, TEMPLATE, journal(path, engine), 2) == first
    assert path.read_text() == whole
    # Batches of 2, 2 and 1 questions of 3 answers: only those that lack something are done.
    assert asked == {1: [6, 6, 3], 2: [6, 6, 3], 4: [6, 3]}[lines]
    asked.clear()
    assert run.by_likelihood(engine, QUESTIONS, TEMPLATE, journal(path, engine), 2) == first
    assert not asked


def test_other_settings_are_refused_or_start_anew(engine, tmp_path):
    path = tmp_path / "j"
    kept = journal(path, engine, prompt="plain")
    kept.add({0: {"scores": {}}})
    assert journal(path, engine, prompt="plain").results.keys() == {0}
    with pytest.raises(ValueError, match=r"\(prompt: 'plain', now 'primer'\).*--overwrite"):
        journal(path, engine, prompt="primer")
    assert journal(path, engine, overwrite=True, prompt="primer").results == {}
    path.write_text('{"half": ')
    assert journal(path, engine).results == {}
    path.write_text("nothing\n")
    with pytest.raises(ValueError, match=r"j:1: not a result"):
        journal(path, engine)


def test_settings_tell_everything_apart(engine, words):
    def key(engine, questions=QUESTIONS, **more):
        return json.dumps(settings.collect(engine, "ranking", questions, **more))

    same = SteeredEngine(tiny_peft(), words, SteeringConfig(-3.0, alpha=0.05))
    assert key(engine) == key(same)
    other = tiny_peft()
    weight = next(p for p in other.parameters() if p.requires_grad)
    weight.data.view(-1)[13] += 1e-3
    changed = [
        key(SteeredEngine(other, words, engine.steering)),
        key(SteeredEngine(tiny_peft(), words, SteeringConfig(-3.0, alpha=0.1))),
        key(SteeredEngine(tiny_peft(), words)),
        key(engine, QUESTIONS[:4]),
        key(engine, [replace(QUESTIONS[0], right=["w012"]), *QUESTIONS[1:]]),
        key(engine, prompt="primer"),
    ]
    assert len({key(engine), *changed}) == 7


def test_without_steering_two_models_are_compared(words, tmp_path):
    engine = SteeredEngine(tiny_peft(), words)
    got = run.by_likelihood(engine, QUESTIONS, TEMPLATE, journal(tmp_path / "j", engine), 8)
    assert list(got) == ["base", "adapted"]


def test_errors_name_the_line_before_any_work(engine, tmp_path):
    kept = journal(tmp_path / "j", engine)
    long = replace(QUESTIONS[1], wrong=[" ".join(["w009"] * 130)])
    with pytest.raises(
        ValueError, match=r"mc.json:1: the continuation .* does not fit: 134 tokens"
    ):
        run.by_likelihood(engine, [QUESTIONS[0], long], TEMPLATE, kept, 8)
    with pytest.raises(ValueError, match=r"mc.json:0: the question does not fit"):
        run.by_generation(engine, QUESTIONS, TEMPLATE, kept, 8, 128)
    with pytest.raises(ValueError, match=r"mc.json:1: the continuation ' ' has no tokens"):
        run.by_likelihood(
            engine, [QUESTIONS[0], replace(QUESTIONS[1], wrong=[""])], TEMPLATE, kept, 8
        )
    with pytest.raises(ValueError, match="batch_size must be >= 1; got 0"):
        run.by_likelihood(engine, QUESTIONS, TEMPLATE, kept, 0)
    assert not list(tmp_path.iterdir())


def test_the_report_is_paired():
    rng = np.random.default_rng(0)
    hard = rng.random((400, 1)) < 0.5  # questions differ much, the models little
    adapted = hard.astype(float)
    steered = np.where(rng.random((400, 1)) < 0.05, 1.0, adapted)
    result = report.summary(
        "t", ("accuracy",), {"base": adapted, "adapted": adapted, "steered": steered},
        {"overlap": {"training": 2}},
    )  # fmt: skip
    figures = result["differences"]["steered - adapted"]["accuracy"]
    assert figures["mean"] == pytest.approx(100 * (steered - adapted).mean())
    assert 0 < figures["low"] < figures["mean"] < figures["high"]
    alone = result["models"]["steered"]["accuracy"]
    assert alone["high"] - alone["low"] > 2 * (figures["high"] - figures["low"])
    assert result["differences"]["adapted - base"]["accuracy"]["high"] == 0
    assert next(iter(result["differences"])) == "steered - adapted"
    text = report.markdown(result)
    assert f"| steered - adapted | {figures['mean']:+.1f} [" in text
    assert "the adapter saw 2 in training" in text
    assert "not recorded" in report.note({"settings": {}})
    assert "steered is adapted" in report.note({"settings": {"steering": {"strength": 0.0}}})
