"""The strength of planted data, its verdict and its report."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from svd_engine import Steering, SteeringConfig, calibration
from svd_engine.calibration import estimators, support_stats
from svd_engine.calibration.calibrate import calibrate, fit
from svd_engine.calibration.objectives import Answers
from svd_engine.calibration.options import CalibrationKeywords, CalibrationOptions
from svd_engine.data import contamination
from svd_engine.data.examples import encode
from svd_engine.utils import bootstrap, plots
from tests.calibration.cases import answers
from tests.calibration.cases import engine as engine  # a fixture
from tests.tiny import VOCAB


def test_alpha_is_chosen_by_cross_validation(engine):
    examples, alphas = answers(10), (0.5, 0.01, 0.1)
    report = engine.calibrate(examples, alpha=alphas)
    assert [alpha for alpha, _ in report.alpha_losses] == list(alphas)
    best = min(report.alpha_losses, key=lambda pair: pair[1])[0]
    assert report.alpha == engine.steering.generation.alpha == best
    alone = engine.calibrate(examples, alpha=best)
    assert report.curve == alone.curve and report.strength == alone.strength
    assert dict(report.alpha_losses)[best] == alone.alpha_losses[0][1]
    assert engine.calibrate(examples[:4], alpha=alphas, folds=2).alpha in alphas


class Planted:
    """Stands for the pair: every position has the logits that it is given."""

    device = torch.device("cpu")

    def __init__(self, adapted, base):
        self.rows = adapted, base

    def prefill(self, prompts, *_):
        return tuple(torch.zeros(len(prompts), 1) for _ in range(2))

    def logits(self, hidden):
        return tuple(row.expand(len(hidden[0]), -1) for row in self.rows)


# Two likely tokens, of which training moved the odds from 1 to 0.
PLANTED = Planted(torch.tensor([[1.0, 0.8, -9.0, -9.0]]), torch.tensor([[0.0, 1.6, -9.0, -9.0]]))


def of_tokens(right):
    return encode([dict(prompt=[3], completion=[int(t)]) for t in right], None)


def calibrated(pair, right=(), examples=None, **options):
    answers = Answers(encode(examples, None) if examples else of_tokens(right))
    return calibrate(pair, answers, CalibrationOptions.checked(answers.wrong, **options))


def planted(right):
    return calibrated(PLANTED, right, objective="nll")


def test_verdicts():
    further = planted([0] * 38 + [1] * 2)  # the data are further from the base than the model
    assert further.worthwhile and further.strength < 0 and further.gain_interval[0] > 0
    assert further.interval[0] <= further.strength <= further.interval[1]
    back = planted([1] * 38 + [0] * 2)
    assert back.worthwhile and back.strength > 0
    there = planted([0] * 22 + [1] * 18)  # p(0) = 0.55: nothing to gain
    assert not there.worthwhile and "indifferent" in there.verdict
    assert there.nll_after <= there.nll_before + 0.02
    assert planted([0] * 40).at_bracket


@pytest.mark.slow
@pytest.mark.parametrize("count", [5, 20, 120])
@pytest.mark.parametrize("chance", [0.55, 0.9])
def test_the_likelihood_of_new_examples_never_suffers(chance, count, monkeypatch):
    """The adapted model gives token 0 a chance of 0.55; `chance` is the truth.

    Five tokens may all be token 0, which the largest strength would suit best.
    """
    monkeypatch.setattr(bootstrap, "DRAWS", 400)
    new = Answers(of_tokens([0, 1]))
    nll = new.losses(support_stats.collect(PLANTED, new.passages, 0.1), "nll")
    truth = np.array([chance, 1 - chance])
    rng = np.random.default_rng(0)
    used = 0
    for _ in range(8):
        report = planted(rng.random(count) > chance)
        strength = report.strength if report.worthwhile else 0.0
        used += report.worthwhile
        assert truth @ nll(strength) <= truth @ nll(0.0) + 0.002
    assert used == (8 if (chance, count) == (0.9, 120) else 0) or (chance, count) == (0.9, 20)


@pytest.mark.parametrize("objective", ["nll", "preference", "ranking"])
@pytest.mark.parametrize("rounding", [0.0, 1e-9])
def test_strength_is_0_where_nothing_is_to_choose(objective, rounding):
    """An adapter that has learnt nothing."""
    logits = torch.tensor([[1.0, 0.8, 0.7, -9.0]])
    examples = [dict(prompt=[3], completion=[i % 2], rejected=[[2]]) for i in range(10)]
    held = Answers(encode(examples, None))
    options = CalibrationOptions.checked(held.wrong, objective=objective)
    stats = support_stats.collect(Planted(logits, logits), held.passages, 0.1)
    shift = torch.tensor([rounding, -rounding, rounding / 2], dtype=torch.float64)
    report = fit(held, replace(stats, delta=shift.repeat(20)), options)
    assert report.strength == report.optimum == report.likelihood_strength == 0
    assert report.interval == (0, 0) and not report.at_bracket and not report.worthwhile
    assert report.loss_after == report.loss_before and "indifferent" in report.verdict


def least(losses, counts):
    """A strength of the bracket at which counts @ losses is least, by ever finer searches."""
    best, step = 0.0, 0.5
    tried = np.arange(-64, 64.1, step)
    for _ in range(4):
        best = tried[np.argmin([counts @ losses(strength) for strength in tried])]
        tried = np.clip(best + step * np.linspace(-1, 1, 41), -64, 64)
        step /= 20
    return best


@pytest.mark.parametrize("objective", ["nll", "preference"])
@pytest.mark.parametrize("alphas", [(0.1,), (0.5, 0.01)])
def test_held_out_figures_are_those_of_a_loop_over_folds(engine, objective, alphas):
    """No example has a part in the alpha or the strength that its loss is measured at."""
    examples, folds, seed = answers(9, seed=4), 3, 7
    report = engine.calibrate(examples, objective=objective, alpha=alphas, folds=folds, seed=seed)
    held = Answers(encode(examples, None))
    stats = support_stats.collect(engine.pair, held.passages, min(alphas))
    fold = np.random.default_rng(seed).permutation(9) % folds
    losses = {alpha: held.losses(stats.at(alpha), objective) for alpha in alphas}
    nll = {alpha: held.losses(stats.at(alpha), "nll") for alpha in alphas}
    curves = {
        alpha: np.stack([losses[alpha](strength) for strength in estimators.GRID], 1)
        for alpha in alphas
    }
    loss_after, nll_after = np.zeros(9), np.zeros(9)
    for outer in range(folds):
        others = fold != outer
        tried = []
        for alpha in alphas:
            parts = [others & (fold == inner) for inner in range(folds) if inner != outer]
            points = [curves[alpha][others & ~part].sum(0).argmin() for part in parts]
            tried.append(
                sum(curves[alpha][p, at].sum() for p, at in zip(parts, points, strict=True))
            )
        alpha = alphas[int(np.argmin(tried))]
        strength = least(losses[alpha], others.astype(float))
        loss_after[~others] = losses[alpha](strength)[~others]
        nll_after[~others] = nll[alpha](strength)[~others]
    weights = held.tokens() if objective == "nll" else np.ones(9)
    before = losses[report.alpha](0.0)
    near = dict(rel=1e-4, abs=1e-5)
    assert report.loss_before == pytest.approx(before.sum() / weights.sum(), **near)
    assert report.loss_after == pytest.approx(loss_after.sum() / weights.sum(), **near)
    assert report.nll_after == pytest.approx(nll_after.sum() / held.tokens().sum(), **near)
    if objective == "preference":
        gain = bootstrap.of_ratio(before - loss_after, weights, seed)
        assert report.gain_interval == pytest.approx(gain, rel=1e-3, abs=1e-4)


def test_strength_is_0_where_nothing_is_gained(engine):
    examples = answers(12, seed=5)
    report = engine.calibrate(examples, objective="preference")
    assert engine.steering.generation.strength == (report.strength if report.worthwhile else 0.0)
    assert engine.steering.generation.verdict == report.verdict
    assert engine.steering.generation.vocab_size == VOCAB


def test_same_seed_same_report(engine):
    examples = answers(8)
    assert engine.calibrate(examples, seed=3) == engine.calibrate(examples, seed=3)


def test_report_is_saved_as_json_and_drawn(engine, tmp_path, monkeypatch):
    report = engine.calibrate(answers(8))
    saved = json.loads(report.save(tmp_path).read_text())
    assert saved["strength"] == report.strength and len(saved["curve"]) == len(estimators.GRID)
    assert report.objective == "preference" and len(saved["estimates"]) == 8
    if plots.find_spec("matplotlib"):
        assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    (tmp_path / "bare").mkdir()
    assert [report.save(tmp_path / "bare")] == list((tmp_path / "bare").iterdir())


def test_save_keeps_the_report_the_prompts_and_the_strength(engine, tmp_path):
    examples = answers(8)
    report = engine.calibrate(examples, force=True)
    path = calibration.save(tmp_path, report, engine.steering, examples)
    assert path == tmp_path / "steering_config.json"
    assert SteeringConfig.from_pretrained(tmp_path) == engine.steering.generation
    assert json.loads((tmp_path / "calibration.json").read_text())["strength"] == report.strength
    with pytest.raises(ValueError, match="8 of 8 prompts were seen in calibration"):
        contamination.check(tmp_path, [example["prompt"] for example in examples])


def test_the_snippet_of_the_documentation(engine, tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "calibration.md"
    monkeypatch.chdir(tmp_path)
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(snippet, dict(engine=engine, examples=answers(8)))
    assert SteeringConfig.from_pretrained("my-adapter") == engine.steering.generation


def test_keywords_are_the_options():
    names = {field.name for field in fields(CalibrationOptions)}
    assert names - {"alphas"} | {"alpha"} == set(CalibrationKeywords.__annotations__)


def test_a_token_that_the_model_cannot_predict_is_named(engine):
    impossible = Planted(torch.tensor([[1.0, -torch.inf]]), torch.tensor([[1.0, 0.0]]))
    with pytest.raises(ValueError, match="passage 2 holds a token"):
        calibrated(impossible, [0, 0, 1], folds=2)


BAD = {
    "examples is empty": ([], {}),
    "objective must be": (answers(6), dict(objective="both")),
    "no rejected answers": (answers(6, wrong=0), dict(objective="preference")),
    "has no rejected answers to prefer": (answers(6, wrong=0), dict(use="ranking")),
    "use must be one of generation, ranking": (answers(6), dict(use="both")),
    "is no measure of texts": (answers(6), dict(use="generation", objective="ranking")),
    r"folds must lie in \[2, number of examples = 6\]": (answers(6), dict(folds=7)),
    "estimator must be one of exact, mean": (answers(6), dict(estimator="mode")),
    "hessian must be one of gauss-newton": (answers(6), dict(hessian="exact")),
    "length_normalised compares": (answers(6), dict(objective="nll", length_normalised=True)),
    "alpha must lie in": (answers(6), dict(alpha=0.0)),
    r"alpha must lie in \(0, 1\], one": (answers(6), dict(alpha=[0.1, 1.5])),
    "one number or several": (answers(6), dict(alpha=[])),
    r"got 0\.0": (answers(6), dict(alpha=[0.1, 0.0])),
    r"examples\[0\]: an answer is empty": ([dict(prompt=[4], completion=[])], {}),
    "does not fit": ([dict(prompt=[4] * 128, completion=[5])] * 6, {}),
}


@pytest.mark.parametrize("message", BAD)
def test_refusals(engine, message):
    engine.steering = SteeringConfig(1.5)
    examples, options = BAD[message]
    with pytest.raises(ValueError, match=message):
        engine.calibrate(examples, **options)
    assert engine.steering == Steering.of(SteeringConfig(1.5))


def test_intervals_cover():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        low, high = bootstrap.of_ratio(rng.normal(1.0, 1.0, 50), seed=seed)
        hits += low <= 1.0 <= high
    assert 180 <= hits <= 199
