"""One strength per use: texts are decoded with one, answers are scored with the other."""

import json

import pytest
import torch

from svd_engine import SteeredEngine, Steering, SteeringConfig, calibration
from svd_engine.data import contamination
from svd_engine.kernels import reference
from tests.calibration.cases import answers
from tests.tiny import assert_same_tokens, teacher_forced_two_pass, tiny_peft

PROMPT, COMPLETION = [5, 17, 40, 9], [33, 2, 101]


@pytest.fixture
def engine():
    return SteeredEngine(tiny_peft())


@torch.no_grad()
def by_two_passes(engine, strength):
    """log P of COMPLETION, off the support as the adapted model has it."""
    ids = torch.tensor([PROMPT + COMPLETION])
    adapted = engine.model(ids).logits[0, 3:-1].double()
    with engine.model.disable_adapter():
        base = engine.model(ids).logits[0, 3:-1].double()
    return reference.score(
        adapted, base, strength, torch.tensor(COMPLETION), alpha=0.1, penalty=0.0
    ).sum()


def test_generate_and_score_take_theirs(engine):
    engine.steering = Steering(SteeringConfig(-2.0), SteeringConfig(-9.0))
    (greedy,) = engine.generate([PROMPT], max_new_tokens=8, eos_token_id=[])
    truth = teacher_forced_two_pass(engine.model, PROMPT, greedy.token_ids, -2.0)
    assert_same_tokens(greedy.token_ids, truth, tie=1e-4)
    (score,) = engine.score(PROMPT, [COMPLETION])
    assert score == pytest.approx(float(by_two_passes(engine, -9.0)), abs=1e-4)


def test_a_use_without_a_strength_is_not_steered(engine):
    engine.steering = Steering(ranking=SteeringConfig(-9.0))
    (plain,) = engine.generate([PROMPT], max_new_tokens=8)
    assert plain == engine.generate([PROMPT], max_new_tokens=8, model="adapted")[0]
    with pytest.raises(ValueError, match="a strength for generation"):
        engine.generate([PROMPT], max_new_tokens=8, model="steered")
    engine.steering = Steering(SteeringConfig(-9.0))
    (score,) = engine.score(PROMPT, [COMPLETION])
    assert score == pytest.approx(float(by_two_passes(engine, 0.0)), abs=1e-4)
    with pytest.raises(ValueError, match="a strength for ranking"):
        engine.score(PROMPT, [COMPLETION], model="steered")


def test_calibrating_one_use_leaves_the_other(engine, tmp_path):
    by_hand = SteeringConfig(-1.5)
    engine.steering = Steering(by_hand, by_hand)
    report = engine.calibrate(answers(8), objective="ranking", force=True)
    assert report.use == "ranking" and engine.steering.generation == by_hand
    assert engine.steering.ranking.strength == report.strength != -1.5
    by_hand.save_pretrained(tmp_path)
    calibration.save(tmp_path, report, engine.steering, answers(8))
    assert Steering.from_pretrained(tmp_path) == engine.steering

    other = SteeredEngine(engine.model)
    further = other.calibrate(answers(8, seed=1), use="generation", force=True)
    assert other.steering.ranking is None
    calibration.save(tmp_path, further, other.steering, answers(8, seed=1))
    kept = Steering.from_pretrained(tmp_path)
    assert kept == Steering(other.steering.generation, engine.steering.ranking)
    for name, each in (("calibration", further), ("calibration-ranking", report)):
        assert json.loads((tmp_path / f"{name}.json").read_text())["strength"] == each.strength
    for seed in (0, 1):  # the prompts of both are remembered
        prompts = contamination.prompts(answers(8, seed=seed))
        with pytest.raises(ValueError, match="8 of 8 prompts were seen in calibration"):
            contamination.check(tmp_path, prompts)


def test_what_is_of_another_vocabulary_goes(engine, tmp_path):
    SteeringConfig(-1.0, vocab_size=999).save_pretrained(tmp_path)
    report = engine.calibrate(answers(8), force=True)
    calibration.save(tmp_path, report, engine.steering, answers(8))
    assert Steering.from_pretrained(tmp_path) == Steering(engine.steering.generation)
