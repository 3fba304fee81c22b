"""Arguments of a wrong type get a ValueError that names them, before any work."""

import math
from typing import get_type_hints

import numpy as np
import pytest
import torch

from svd_engine import SteeredEngine, Steering, SteeringConfig
from svd_engine.generation.options import GenerateOptions
from tests.tiny import tiny_peft

WRONG = [True, "hot", -4.5, object(), [object()], b"x", math.nan, [True], torch.tensor(1.5), {5: 1}]
NAMES_OF_CALIBRATION = (
    "use", "objective", "estimator", "hessian", "alpha", "direction", "folds", "seed",
)  # fmt: skip
CALIBRATION_OPTIONS = (
    "use", "objective", "estimator", "hessian", "alpha", "direction", "folds", "seed",
)  # fmt: skip
# What these options take of the list above.
TAKEN = {
    "do_sample": [0], "early_stopping": [0], "length_penalty": [2], "presence_penalty": [2],
    "frequency_penalty": [2], "stop_strings": [1], "logit_bias": [9], "contrast": [1],
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(words):
    return SteeredEngine(tiny_peft(), words, SteeringConfig(-1.0))


@pytest.fixture(autouse=True)
def without_work(engine, monkeypatch):
    monkeypatch.setattr(engine.pair, "prefill", lambda *_: pytest.fail("the model was run"))


def refuse(call, *names):
    with pytest.raises(ValueError) as error:
        call()
    assert any(name in str(error.value) for name in names), str(error.value)


@pytest.mark.parametrize("name", get_type_hints(GenerateOptions))
def test_options(engine, name):
    for i, value in enumerate(WRONG):
        if i in TAKEN.get(name, ()):
            continue
        options = {"prompts": [5], "max_new_tokens": 4, name: value}
        for other in {"messages": ["prompts"], "max_length": ["max_new_tokens"]}.get(name, ()):
            del options[other]
        # a temperature and do_sample contradict each other
        refuse(lambda: engine.generate(**options), name, "chat template", "temperature")  # noqa: B023


def test_prompts_scores_and_the_engine(engine, tiny_folder):
    base, adapter = tiny_folder / "base", tiny_folder / "adapter"
    for value in WRONG:
        is_text = isinstance(value, str)
        calls = {
            "prompts": lambda: engine.generate(value, max_new_tokens=2),  # noqa: B023
            "continuations": lambda: engine.score([5], value),  # noqa: B023
            "penalty": lambda: engine.score([5], [[6]], penalty=value),  # noqa: B023
            "model": lambda: engine.score([5], [[6]], model=value),  # noqa: B023
            "steering": lambda: setattr(engine, "steering", value),  # noqa: B023
            "batch_sizes": lambda: engine.warmup(value),  # noqa: B023
            "max_length": lambda: engine.warmup((1,), value),  # noqa: B023
            "tokenizer": lambda: SteeredEngine(engine.model, value),  # noqa: B023
            "adapter": lambda: SteeredEngine.from_pretrained(value),  # noqa: B023
            "base": lambda: SteeredEngine.from_pretrained(value, adapter),  # noqa: B023
            "device": lambda: SteeredEngine.from_pretrained(base, adapter, device=value),  # noqa: B023
        }
        for name, call in calls.items():
            if not (is_text and name in ("prompts", "continuations")) and value != -4.5:
                refuse(call, name)
    call = lambda: engine.generate([5], max_new_tokens=2, steering=-4.0)  # noqa: E731
    refuse(call, "SteeringConfig(strength=-4.0)")
    refuse(lambda: engine.generate(5), "prompts must be text, token ids or a list of these; got 5")


def test_calibration_options(engine):
    examples = [dict(prompt="w005", completion="w006", rejected=["w007"])] * 3
    for value in WRONG:
        for name in CALIBRATION_OPTIONS:
            refuse(lambda: engine.calibrate(examples, **{name: value}), name)  # noqa: B023
    refuse(lambda: engine.calibrate(examples, alpha=["0.1"]), "alpha must be a number; got '0.1'")


def test_integers_of_numpy_are_integers(words):
    engine = SteeredEngine(tiny_peft(), words, SteeringConfig(-1.0))
    plain = dict(max_new_tokens=4, top_k=3, min_new_tokens=2, num_return_sequences=2, seed=5)
    given = {name: np.int32(value) for name, value in plain.items()}
    more = dict(temperature=0.7, prompts=[[5, 6]])
    assert engine.generate(**more, **given) == engine.generate(**more, **plain)


def test_errors_say_what_an_option_takes(engine):
    refuse(
        lambda: engine.generate([5], max_new_tokens=4, seed=1.5),
        "seed must be an integer or a list of int",
    )
    refuse(lambda: engine.generate("w005", do_sample="yes"), "do_sample must be True or False")
    refuse(lambda: Steering(-4.0), "generation must be a SteeringConfig; got -4.0")


def test_what_an_engine_says_of_itself(tiny_folder):
    base, adapter = tiny_folder / "base", tiny_folder / "adapter"
    engine = SteeredEngine.from_pretrained(base, adapter, steering=SteeringConfig(-4.0))
    assert repr(engine) == (
        f"SteeredEngine(base={str(base)!r}, adapter={str(adapter)!r}, method='LORA', "
        f"pairing='paired', step={engine.step!r}, steering=(strength=-4.0, alpha=0.1))"
    )
    made = SteeredEngine(engine.model, pairing="sequential")
    assert "adapter='default'" in repr(made)
    assert "pairing='sequential'" in repr(made) and repr(made).endswith("steering=None)")


def test_a_completion_tells_which_model_wrote_it(words, monkeypatch):
    engine = SteeredEngine(tiny_peft(), words)
    for beams in ({}, dict(num_beams=2)):
        engine.steering = None
        (got,) = engine.generate([[5]], max_new_tokens=2, **beams)
        assert got.model == "adapted"
        assert engine.generate([[5]], model="base", max_new_tokens=2, **beams)[0].model == "base"
        engine.steering = SteeringConfig(-1.0)
        assert engine.generate([[5]], max_new_tokens=2, **beams)[0].model == "steered"
