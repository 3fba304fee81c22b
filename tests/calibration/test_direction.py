"""Steering by the gradient itself: the same everywhere as the formula on whole rows."""

import math

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList

from svd_engine import SteeredEngine, Steering, SteeringConfig, SteeringLogitsProcessor
from svd_engine.calibration import support_stats
from svd_engine.calibration.objectives import Answers
from svd_engine.data.examples import encode
from svd_engine.kernels import reference
from tests.tiny import VOCAB, tiny_peft

PROMPT, COMPLETION = [5, 17, 40, 9], [33, 2, 101]


def by_hand(z, b, mu, alpha, penalty):
    """z + mu (g - E_p[g]) with g of (7), in float64."""
    logp, logq = z.double().log_softmax(-1), b.double().log_softmax(-1)
    g = -(logp - logq + 1)
    steered = z + mu * (g - (logp.exp() * g).sum(-1, keepdim=True))
    kept = z >= z.amax(-1, keepdim=True) + (math.log(alpha) if alpha else -math.inf)
    return torch.where(kept, steered, -math.inf if penalty == -math.inf else z + abs(mu) * penalty)


@pytest.fixture(scope="module")
def engine():
    return SteeredEngine(tiny_peft())


@torch.no_grad()
def rows(engine, tokens):
    """Both models' logits after every token."""
    ids = torch.tensor([tokens])
    adapted = engine.model(ids).logits[0]
    with engine.model.disable_adapter():
        return adapted, engine.model(ids).logits[0]


def config(strength, **options):
    return SteeringConfig(strength, direction="difference", **options)


@pytest.mark.parametrize("penalty", [-math.inf, -1.5, 0.0])
@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_the_reference_is_the_formula(alpha, penalty):
    z, b = torch.randn(2, 3, 50, dtype=torch.float64)
    got = reference.steer(z, b, -2.0, alpha=alpha, penalty=penalty, direction="difference")
    torch.testing.assert_close(got, by_hand(z, b, -2.0, alpha, penalty))
    if alpha == 0:  # the contrast of the two models
        torch.testing.assert_close(got.softmax(-1), (3 * z - 2 * b).softmax(-1))


def test_impossible_tokens_and_bad_rows():
    z, b = torch.randn(2, 4, 20)
    z[0, 3] = b[0, 3] = z[1, 4] = b[2, 5] = -math.inf
    z[3, 0] = math.nan
    got = reference.steer(z, b, -2.0, alpha=0.0, direction="difference")
    assert got[0, 3] == got[1, 4] == -math.inf and got[2, 5] == z[2, 5]
    assert got[:3].isfinite().sum() == 58 and got[3].isnan().all()


@pytest.mark.parametrize("alpha", [0.01, 0.1])
def test_supports_give_the_score_at_any_strength(engine, alpha):
    passages = Answers(
        encode([dict(prompt=PROMPT, completion=COMPLETION, rejected=[[7], [9, 60, 3]])] * 2, None)
    ).passages
    stats = support_stats.collect(engine.pair, passages, alpha).along("difference")
    for mu in (-64.0, -3.0, 0.0, 2.0, 64.0):
        steered = []
        for prompt, completion in passages:
            z, b = (x[len(prompt) - 1 : -1] for x in rows(engine, prompt + completion))
            logp = by_hand(z, b, mu, alpha, 0.0).log_softmax(-1)
            steered.append(float(logp.gather(-1, torch.tensor(completion)[:, None]).sum()))
        got = stats.totals(stats.logprob(mu), len(passages)).numpy()
        np.testing.assert_allclose(got, steered, rtol=1e-4, atol=1e-3)


def test_no_exponential_overflows():
    z, b = torch.tensor([[0.0, -1.0, -40.0]]), torch.tensor([[-90.0, -1.0, 0.0]])
    stats = support_stats.gather([((z, b), torch.tensor([1]), torch.tensor([0]))], 1e-30)
    got = stats.along("difference").logprob(-64.0)
    truth = by_hand(z, b, -64.0, 1e-30, 0.0).log_softmax(-1)[:, 1]
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=0)


def test_greedy_tokens_beams_and_scores_are_the_two_pass_ones(engine):
    steering, tokens = config(-2.0, alpha=0.05), list(PROMPT)
    for _ in range(8):
        z, b = (x[-1:] for x in rows(engine, tokens))
        tokens.append(int(by_hand(z, b, -2.0, 0.05, -math.inf).argmax()))
    (greedy,) = engine.generate([PROMPT], steering=steering, max_new_tokens=8, eos_token_id=[])
    assert greedy.token_ids == tokens[len(PROMPT) :]
    (beam,) = engine.generate(
        [PROMPT], steering=steering, max_new_tokens=8, eos_token_id=[], num_beams=3
    )
    assert sum(beam.logprobs) >= sum(greedy.logprobs) - 1e-4

    engine.steering = steering
    z, b = (x[len(PROMPT) - 1 : -1] for x in rows(engine, PROMPT + COMPLETION))
    logp = by_hand(z, b, -2.0, 0.05, 0.0).log_softmax(-1)
    expected = float(logp.gather(-1, torch.tensor(COMPLETION)[:, None]).sum())
    assert engine.score(PROMPT, [COMPLETION]) == pytest.approx([expected], abs=1e-4)


def test_the_logits_processor_does_the_same(engine):
    steering = config(-2.0, alpha=0.05)
    model = tiny_peft()
    made = model.generate(
        torch.tensor([PROMPT]), attention_mask=torch.ones(1, 4, dtype=torch.long),
        max_new_tokens=8, do_sample=False, eos_token_id=[], pad_token_id=0,
        logits_processor=LogitsProcessorList([SteeringLogitsProcessor(model, steering)]),
    )  # fmt: skip
    (own,) = SteeredEngine(model).generate(
        [PROMPT], steering=steering, max_new_tokens=8, eos_token_id=[]
    )
    assert made[0, 4:].tolist() == own.token_ids


@pytest.mark.slow
def test_calibration_finds_the_optimum_and_the_artefact_keeps_it(engine, tmp_path):
    generator = torch.Generator().manual_seed(0)

    def text(length):
        return torch.randint(3, VOCAB, (length,), generator=generator).tolist()

    examples = [
        dict(prompt=text(4), completion=text(3), rejected=[text(2), text(3)]) for _ in range(12)
    ]
    report = engine.calibrate(examples, objective="nll", direction="difference", force=True)
    assert report.direction == engine.steering.generation.direction == "difference"

    def nll(mu):
        total = 0.0
        for example in examples:
            z, b = (
                x[len(example["prompt"]) - 1 : -1]
                for x in rows(engine, example["prompt"] + example["completion"])
            )
            logp = by_hand(z, b, mu, 0.1, 0.0).log_softmax(-1)
            total -= float(logp.gather(-1, torch.tensor(example["completion"])[:, None]).sum())
        return total

    best = nll(report.strength)
    assert best <= min(nll(mu) for mu in np.linspace(-64, 64, 65)) + 1e-3
    engine.steering.save_pretrained(tmp_path)
    assert Steering.from_pretrained(tmp_path) == engine.steering
