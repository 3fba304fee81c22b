"""How two rows of logits become one, and what a request may ask; without vLLM."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close as close

from svd_engine import Steering, SteeringConfig
from svd_engine.integrations.vllm import requests
from svd_engine.integrations.vllm.steering import Rows, SteeredLogits
from svd_engine.kernels import reference

DEFAULT = SteeringConfig(-3.0, alpha=0.2, direction="difference")


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return 3 * torch.randn(4, 50), 3 * torch.randn(4, 50)


def steer(adapted, base, strength, config, penalty=None):
    penalty = config.penalty if penalty is None else penalty
    return reference.steer(
        adapted, base, strength, alpha=config.alpha, penalty=penalty, direction=config.direction
    )


def test_rows_of_their_own(logits):
    adapted, base = logits
    asked = [{}, {"strength": 2.0}, {"model": "adapted"}, {"model": "base"}]
    rows = Rows.of([requests.choose(extra, DEFAULT) for extra in asked], torch.device("cpu"))
    out = SteeredLogits(Steering.of(DEFAULT)).combine(adapted, base, rows)
    for i, strength in enumerate((-3.0, 2.0)):
        want = steer(adapted[i : i + 1], base[i : i + 1], strength, DEFAULT)[0]
        kept = want.isfinite()
        assert torch.equal(out[i].isfinite(), torch.ones(50, dtype=bool))
        close(out[i][kept], want[kept])
        assert out[i][~kept].max() < out[i][kept].min() - 1000
        assert torch.equal(out[i][~kept].argsort(), adapted[i][~kept].argsort())
        close(out[i].softmax(0), want.softmax(0))
    assert torch.equal(out[2], adapted[2]) and torch.equal(out[3], base[3])


def test_a_penalty_that_is_finite_stays(logits):
    config = SteeringConfig(-3.0, alpha=0.2, penalty=-2.0)
    out = SteeredLogits(Steering.of(config)).combine(*logits, Rows(-3.0))
    close(out, steer(*logits, -3.0, config))


def test_tokens_of_a_prompt_have_the_strength_for_ranking_and_no_penalty(logits):
    ranking = SteeringConfig(1.5, alpha=0.3)
    found = SteeredLogits(Steering(DEFAULT, ranking)).combine(*logits, None)
    close(found, steer(*logits, 1.5, ranking, penalty=0.0))
    assert torch.equal(SteeredLogits(Steering(DEFAULT)).combine(*logits, None), logits[0])


def test_without_a_steering_the_adapted_model_decodes(logits):
    steered = SteeredLogits(Steering())
    rows = Rows.of([requests.choose(None, steered.default)] * 4, torch.device("cpu"))
    assert torch.equal(steered.combine(*logits, rows), logits[0])


def test_how_to_decode_is_used_up():
    steered = SteeredLogits(Steering.of(DEFAULT))
    steered.next = rows = Rows(1.0)
    assert steered.take() is rows and steered.take() is None


@pytest.mark.parametrize("prompt_logprobs", [None, 0])
def test_usual_requests_pass(prompt_logprobs):
    requests.check(SimpleNamespace(extra_args=None, prompt_logprobs=prompt_logprobs))
