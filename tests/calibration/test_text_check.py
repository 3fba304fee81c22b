"""Greedy texts of the three models, and how much steering changes them."""

import pytest

from svd_engine import SteeredEngine
from svd_engine.calibration import text_check
from svd_engine.generation.outputs import Completion
from svd_engine.steering_config import SteeringConfig
from tests.calibration.cases import answers
from tests.tiny import assert_same_tokens, teacher_forced_two_pass, tiny_peft


def test_its_figures_by_hand():
    made = {
        "base": [[1, 2, 3], [4]],
        "adapted": [[1, 2, 3, 4], [5, 6]],
        "steered": [[1, 2, 9, 9, 9, 9], [5, 6]],
    }

    def generate(prompts, model="steered", **_):
        texts = [f" {model} {prompt} " for prompt in prompts]
        return [Completion(ids, text=t) for ids, t in zip(made[model], texts, strict=True)]

    got = text_check.check(generate, ["a", "b"], SteeringConfig(-2.0))
    assert got.changed == pytest.approx(4 / 8)  # 9 four times: two replace a token, two come after
    assert got.distinct["steered"] == pytest.approx((5 / 8, 4 / 6))
    assert got.distinct["base"] == (1.0, 1.0)
    assert got.answers[1] == {m: f"{m} b" for m in ("base", "adapted", "steered")}


def test_calibration_for_generation_shows_the_texts_of_its_strength():
    engine, examples = SteeredEngine(tiny_peft()), answers(8)
    seen = []
    generate = engine.generate
    engine.generate = lambda *a, **k: seen.append((k, generate(*a, **k))) or seen[-1][1]
    report = engine.calibrate(examples)
    assert len(report.texts.answers) == text_check.PROMPTS == len(seen[0][1])
    assert [k.get("model") for k, _ in seen] == ["base", "adapted", None]
    # The strength is tried although the verdict, of 8 examples, leaves it off.
    assert engine.steering.generation.strength == 0 != report.strength
    for example, completion in zip(examples, seen[-1][1], strict=False):
        ids = completion.token_ids
        truth = teacher_forced_two_pass(engine.model, example["prompt"], ids, report.strength)
        assert_same_tokens(ids, truth, tie=1e-3)
    assert engine.calibrate(examples, use="ranking").texts is None


def test_prompts_without_room_are_left_out():
    engine = SteeredEngine(tiny_peft())
    examples = [dict(example, prompt=[5] * 120) for example in answers(6)]
    assert engine.calibrate(examples, objective="nll").texts is None
    report = engine.calibrate([*examples, *answers(2)], objective="nll")
    assert report.strength and len(report.texts.answers) == 2
