"""The strength against dense searches in float64, and the verdict against planted data."""

import json
import random
import re
from dataclasses import astuple, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from svd_engine import SteeredEngine, Steering, SteeringConfig, calibration
from svd_engine.calibration import estimators, support_stats
from svd_engine.calibration.calibrate import calibrate, fit
from svd_engine.calibration.objectives import Answers
from svd_engine.calibration.options import CalibrationKeywords, CalibrationOptions
from svd_engine.data import contamination
from svd_engine.data.examples import encode
from svd_engine.generation.scoring import Predictions
from svd_engine.kernels import reference
from svd_engine.utils import bootstrap, plots
from tests.tiny import VOCAB, tiny_peft


def answers(n, seed=0, wrong=2):
    rng = random.Random(seed)

    def text(length):
        return [rng.randrange(3, VOCAB) for _ in range(length)]

    return [
        dict(prompt=text(4), completion=text(3), rejected=[text(rng.choice([2, 3]))] * wrong)
        for _ in range(n)
    ]


@pytest.fixture(scope="module")
def engine():
    return SteeredEngine(tiny_peft())


def rows_of(engine, prompt, completion):
    """Both models' float64 logits at every token of the completion."""
    ids = torch.tensor([prompt + completion])
    adapted = engine.model(ids).logits[0, len(prompt) - 1 : -1].double()
    with engine.model.disable_adapter():
        return adapted, engine.model(ids).logits[0, len(prompt) - 1 : -1].double()


@torch.no_grad()
def dense(engine, passages):
    """(mu, alpha) -> log P_mu of each passage from whole rows in float64."""
    rows = [(*rows_of(engine, *passage), torch.tensor(passage[1])) for passage in passages]

    def scores(mu, alpha=0.1):
        each = [
            reference.score(z, b, mu, target, alpha=alpha, penalty=0.0).sum()
            for z, b, target in rows
        ]
        return np.array([float(score) for score in each])

    return scores


@pytest.mark.parametrize("alpha", [0.02, 0.1, 1.0])
def test_supports_give_the_score_at_any_strength(engine, alpha):
    passages = Answers(encode(answers(6), None)).passages
    stats = support_stats.collect(engine.pair, passages, alpha)
    scores = dense(engine, passages)
    for mu in (-20.0, 0.0, 3.0):
        got = stats.totals(stats.logprob(mu), len(passages)).numpy()
        np.testing.assert_allclose(got, scores(mu, alpha), atol=1e-4)


@pytest.mark.parametrize("strength", [-64.0, -1.0, 64.0])
def test_strengths_whose_exponentials_overflow(strength):
    """One position is moved by hundreds of nats, the other hardly, with mass off its support."""
    adapted = torch.tensor([[0.2, 0.0, -3.0, -4.0], [0.3, 0.0, -0.9, -0.8]])
    base = adapted + torch.tensor([[40.0, -40.0, 0.0, 0.0], [0.02, 0.0, 0.01, -0.01]])
    target = torch.tensor([1, 2])
    predicted = Predictions((adapted, base), target, torch.arange(2))
    got = support_stats.gather([predicted], 0.5).logprob(strength)
    rows = adapted.double(), base.double()
    truth = reference.score(*rows, strength, target, alpha=0.5, penalty=0.0)
    torch.testing.assert_close(got, truth, atol=2e-4, rtol=1e-5)


def test_projections_are_those_of_the_operator(engine):
    passages = Answers(encode(answers(4), None)).passages
    stats = support_stats.collect(engine.pair, passages, 0.1)
    got = stats.projections()
    expected = [[], [], []]
    with torch.no_grad():
        for prompt, completion in passages:
            adapted, base = rows_of(engine, prompt, completion)
            terms = reference.project_strength(adapted, base, torch.tensor(completion))
            for column, term in zip(expected, terms[:3], strict=True):
                column.append(term)
    order = torch.argsort(stats.passage, stable=True)
    for mine, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(mine[order], torch.cat(truth), atol=1e-6, rtol=1e-4)
    step = 1e-4
    slope = (stats.logprob(step) - stats.logprob(-step)) / (2 * step)
    torch.testing.assert_close(got[0], slope, atol=1e-6, rtol=1e-5)
    assert (stats.support_sizes() >= 1).all()


def test_exact_is_the_dense_optimum_of_the_likelihood(engine):
    examples = answers(12)
    report = engine.calibrate(examples, objective="nll", force=True)
    scores = dense(engine, [(e.prompt, e.completion) for e in encode(examples, None)])

    def nll(mu):
        return -scores(mu).sum()

    low, high = -64.0, 64.0
    for _ in range(60):  # ternary search: the objective is convex
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if nll(a) < nll(b) else (a, high)
        if high - low < 1e-4:
            break
    assert report.strength == pytest.approx((low + high) / 2, rel=1e-3, abs=1e-3)
    assert engine.steering.generation.strength == report.strength


def test_preference_is_the_global_optimum_of_the_bracket(engine):
    examples = answers(10)
    report = engine.calibrate(examples, objective="preference", force=True)
    held = Answers(encode(examples, None))
    stats = support_stats.collect(engine.pair, held.passages, 0.1)
    losses = held.losses(stats, "preference")
    everywhere = [losses(mu).sum() for mu in np.linspace(-64, 64, 4001)]
    assert losses(report.strength).sum() <= min(everywhere) + 1e-6
    curve = dict(report.curve)
    assert min(curve.values()) >= losses(report.strength).mean() - 1e-9


def test_supports_at_a_larger_alpha_are_those_collected_there(engine):
    passages = Answers(encode(answers(6), None)).passages
    wide = support_stats.collect(engine.pair, passages, 0.01)
    assert len(wide.p) > len(wide.at(0.3).p) > len(wide.at(1.0).p) >= len(wide.adapted)
    for alpha in (0.01, 0.3, 1.0):
        for mine, truth in zip(
            astuple(wide.at(alpha)),
            astuple(support_stats.collect(engine.pair, passages, alpha)),
            strict=True,
        ):
            assert torch.equal(mine, truth)


@pytest.mark.parametrize("spoilt", ["nothing", "adapted -inf", "base -inf", "both -inf"])
def test_the_entries_are_what_steering_changes(spoilt):
    torch.manual_seed(0)
    adapted, base = 3 * torch.randn(2, 20, VOCAB)
    target = torch.arange(20) + 1
    if spoilt in ("adapted -inf", "both -inf"):
        adapted[::3, 40] = -torch.inf
    if spoilt in ("base -inf", "both -inf"):
        base[::3, 40] = -torch.inf
    parts = [
        Predictions((adapted[rows], base[rows]), target[rows], rows)
        for rows in torch.arange(20).split(8)
    ]
    got = support_stats.gather(parts, 0.05)
    z, b = adapted.double(), base.double()
    kept = reference.steer(z, b, 1.0, alpha=0.05).isfinite()
    row, token = kept.nonzero().T
    assert torch.equal(got.position, row)
    assert torch.equal(got.on_target, token == target[row])
    torch.testing.assert_close(got.p, z.softmax(-1)[kept], atol=0, rtol=1e-5)
    delta = reference.steering_vector(z, b)[kept]
    torch.testing.assert_close(got.delta, delta, atol=1e-6, rtol=1e-5)
    for mine, logits in ((got.adapted, z), (got.base, b)):
        every = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
        torch.testing.assert_close(mine, every, atol=1e-5, rtol=0)


def test_the_estimators_by_hand():
    numerator = np.array([1.0, -2.0, 3.0, 0.5, 40.0] * 4)
    denominator = np.array([1.0, 4.0, 1.5, 0.5, 1e-3] * 4)
    ratios = sorted(numerator / denominator)
    expected = {
        "mean": np.mean(ratios),
        "median": 1.0,
        "trimmed": np.mean(ratios[2:-2]),
        "ratio": numerator.sum() / denominator.sum(),
    }
    for name, of_tokens in estimators.FROM_TOKENS.items():
        assert of_tokens(numerator, denominator) == pytest.approx(expected[name], rel=1e-6)


@pytest.mark.parametrize("hessian", estimators.HESSIANS)
@pytest.mark.parametrize("estimator", estimators.FROM_TOKENS)
def test_every_estimator_is_that_of_the_right_answers_tokens(engine, estimator, hessian):
    examples = answers(8)
    report = engine.calibrate(examples, estimator=estimator, hessian=hessian, force=True)
    terms = [[], []]
    with torch.no_grad():
        for example in encode(examples, None):
            adapted, base = rows_of(engine, example.prompt, example.completion)
            term = reference.project_strength(adapted, base, torch.tensor(example.completion))
            terms[0].append(term.numerator.numpy())
            terms[1].append(getattr(term, hessian.replace("-", "_")).numpy())
    expected = estimators.FROM_TOKENS[estimator](*map(np.concatenate, terms))
    estimate = report.estimates[f"{estimator} {hessian}"]
    # A token whose vector is nothing but rounding rules the mean.
    assert estimate == pytest.approx(expected, rel=0.05 if estimator == "mean" else 1e-3)
    assert report.strength == np.clip(estimate, -64, 64)
    assert report.at_bracket == (abs(report.strength) > 63.9)
    low, high = report.interval
    assert -64 <= low <= high <= 64
    assert engine.steering.generation.strength == report.strength
    assert engine.steering.generation.estimator == estimator
    exact = engine.calibrate(examples)
    assert report.optimum == exact.strength and report.estimates == exact.estimates


def test_length_normalised_preference_compares_log_probabilities_a_token(engine):
    examples = answers(6)
    held = Answers(encode(examples, None))
    stats = support_stats.collect(engine.pair, held.passages, 0.1)
    scores = held.scores(stats, 2.0)
    loss = held.losses(stats, "preference", True)(2.0)
    for e, (right, wrong) in enumerate(zip(held.right, held.wrong, strict=True)):
        pairs = [
            np.log1p(np.exp(scores[w] / held.lengths[w] - scores[r] / held.lengths[r]))
            for r in right
            for w in wrong
        ]
        assert loss[e] == pytest.approx(np.mean(pairs))
    report = engine.calibrate(examples, length_normalised=True, force=True)
    assert report.length_normalised and report.strength != engine.calibrate(examples).strength


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


@pytest.mark.parametrize(
    "objective, of_margin",
    [("preference", lambda m: np.log1p(np.exp(m))), ("ranking", lambda m: 1 / (1 + np.exp(-m)))],
)
def test_a_loss_is_the_mean_over_pairs(engine, objective, of_margin):
    examples = answers(5)
    held = Answers(encode(examples, None))
    stats = support_stats.collect(engine.pair, held.passages, 0.1)
    scores = held.scores(stats, -3.0)
    loss = held.losses(stats, objective)(-3.0)
    for e, (right, wrong) in enumerate(zip(held.right, held.wrong, strict=True)):
        pairs = [of_margin(scores[w] - scores[r]) for r in right for w in wrong]
        assert loss[e] == pytest.approx(np.mean(pairs))


def test_ranking_lowers_the_share_of_pairs_in_the_wrong_order(engine):
    report = engine.calibrate(answers(10), objective="ranking", force=True)
    curve = dict(report.curve)
    assert report.loss_name == "ranking loss" and all(0 <= x <= 1 for x in curve.values())
    assert min(curve.values()) < curve[0.0]


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


def test_divergence_is_that_of_whole_rows(engine):
    passages = Answers(encode(answers(3), None)).passages
    stats = support_stats.collect(engine.pair, passages, 0.1)
    order = torch.argsort(stats.passage, stable=True)
    expected = []
    with torch.no_grad():
        for prompt, completion in passages:
            adapted, base = rows_of(engine, prompt, completion)
            steered = reference.steer(adapted, base, -3.0, alpha=0.1, penalty=0.0)
            expected.append(reference.divergence(adapted, steered))
    torch.testing.assert_close(
        stats.divergence(-3.0)[order], torch.cat(expected), atol=1e-5, rtol=1e-4
    )


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


def test_strength_0_is_kept_unless_another_is_better():
    def losses(strength):
        return np.array([max(strength, 0.0)])

    curves = np.maximum(estimators.GRID, 0.0)[None]  # every strength below 0 is as good
    assert estimators.exact(losses, np.ones(1), curves) == 0
    assert estimators.GRID[estimators.best_points(np.ones((1, 1)), curves)] == 0


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
