"""The difference of two models' logits as other methods write it: one call each.

The right values are those methods' own formulas, in float64.
"""

import math

import pytest
import torch
from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor

from svd_engine import ops
from svd_engine.kernels import reference

from .cases import TILE, logits
from .runners import HERE

INF = math.inf
RUNNERS = [
    pytest.param(runner, id=str(runner), marks=[pytest.mark.gpu] if runner.device == "cuda" else [])
    for runner in HERE
    if runner.has("steer, difference") and runner.others > 1
]
STRENGTHS = [0.3, 1.0, 2.5]


@pytest.fixture(params=RUNNERS)
def on(request):
    """(adapted, base, backend); the target of a row is its number."""
    z, b = logits(4, 600 if request.param.tile == TILE else 150, request.param.device)
    with request.param.running():
        yield z, b, request.param.backend


def agrees(on, strength, alpha, truth):
    """Every operator gives the distribution softmax(truth), in which -inf is impossible."""
    z, b, backend = on
    given = dict(alpha=alpha, direction="difference", backend=backend)
    logp, target = truth.log_softmax(-1), torch.arange(len(z), device=z.device)
    near = dict(rtol=1e-5, atol=1e-5)
    steered = ops.steer(z, b, strength, **given).double()
    torch.testing.assert_close(steered.log_softmax(-1), logp, **near)
    drawn = ops.sample(z, b, strength, **given)
    assert torch.equal(drawn.token, truth.argmax(-1))
    torch.testing.assert_close(drawn.logprob.double(), logp.amax(-1), **near)
    best = ops.topk(z, b, strength, 4, **given)
    torch.testing.assert_close(best.logprob.double(), logp.topk(4).values, **near)
    scored = ops.score(z, b, strength, target, **given).double()
    torch.testing.assert_close(scored, logp.diagonal(), **near)


@pytest.mark.parametrize("beta", STRENGTHS)
@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_contrastive_decoding(on, alpha, beta):
    """O'Brien and Lewis (2023): (1 + beta) s_expert - beta s_amateur among likely tokens."""
    expert, amateur = (x.double() for x in on[:2])
    likely = expert >= math.log(alpha) + expert.amax(-1, keepdim=True)
    truth = torch.where(likely, (1 + beta) * expert - beta * amateur, -INF)
    agrees(on, -beta, alpha, truth)


@pytest.mark.parametrize("weight", STRENGTHS)
def test_context_aware_decoding(on, weight):
    """Shi et al. (2024): softmax((1 + a) logits(y | c, x) - a logits(y | x))."""
    with_context, without = (x.double() for x in on[:2])
    agrees(on, -weight, 0.0, (1 + weight) * with_context - weight * without)


@pytest.mark.parametrize("gamma", [0.5, 1.5, 3.0])
def test_classifier_free_guidance(on, gamma):
    """Sanchez et al. (2024), as transformers has it."""
    conditional, unconditional = (x.double() for x in on[:2])
    processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(gamma, model=None)
    processor.get_unconditional_logits = lambda input_ids: unconditional[:, None]
    agrees(on, 1 - gamma, 0.0, processor(None, conditional))


@pytest.mark.parametrize("share", [0.25, 0.5, 1.5])
def test_decoding_time_realignment(on, share):
    """Liu et al. (2024): softmax(l * aligned + (1 - l) * reference model)."""
    aligned, initial = (x.double() for x in on[:2])
    agrees(on, 1 - share, 0.0, share * aligned + (1 - share) * initial)


def test_the_vector_is_the_gradient_less_its_mean(on):
    z, b, backend = on
    p, logq = z.double().softmax(-1), b.double().log_softmax(-1)
    gradient = -(p.log() - logq + 1)
    truth = gradient - (p * gradient).sum(-1, keepdim=True)
    got = ops.steering_vector(z, b, direction="difference", backend=backend)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)


def test_strengths_are_the_derivatives_of_the_likelihood(on):
    z, b, backend = on
    target = torch.arange(len(z), device=z.device)
    given = dict(alpha=0.02, direction="difference")
    got = ops.project_strength(z, b, target, **given, backend=backend)
    step = 1e-4
    low, at, high = (
        reference.score(z.double(), b.double(), mu, target, penalty=0.0, **given)
        for mu in (-step, 0.0, step)
    )
    near = dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.numerator.double(), (high - low) / (2 * step), **near)
    torch.testing.assert_close(got.newton.double(), (2 * at - low - high) / step**2, **near)
