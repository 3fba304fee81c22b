"""Sampling: every token is drawn with the noise of its own seed and position."""

import pytest
import torch

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.kernels import reference
from tests.tiny import PROMPTS, VOCAB, tiny_base, tiny_peft

NEW, SEED = 40, 11


@pytest.fixture(scope="module")
def engine():
    return SteeredEngine(tiny_peft(), steering=SteeringConfig(-2.0, alpha=0.0))


def drawn(engine, **options):
    """Token ids of two sequences of each prompt; sequence i draws with seed SEED + i."""
    options = dict(max_new_tokens=NEW, seed=SEED, num_return_sequences=2, eos_token_id=[]) | options
    completions = engine.generate(PROMPTS, **options)
    assert all(len(completion.token_ids) == NEW for completion in completions)
    return [completion.token_ids for completion in completions]


def test_flat_draws_are_those_of_the_noise_alone(engine):
    """So hot that the model has no say: the greatest noise wins at every position."""
    for i, tokens in enumerate(drawn(engine, temperature=1e9)):
        first = len(PROMPTS[i // 2])
        positions = torch.arange(first, first + NEW)
        noise = reference.gumbel_noise(SEED + i, positions, NEW, VOCAB)
        assert tokens == noise.argmax(-1).tolist()
        assert len(set(tokens)) > NEW * 3 / 4  # of 211 tokens: the draws are independent


def test_rows_keep_their_noise_when_others_end(engine):
    ends = list(range(100, 115))
    options = dict(max_new_tokens=NEW, seed=SEED, num_return_sequences=2, eos_token_id=ends)
    completions = engine.generate(PROMPTS, temperature=1e9, **options)
    for i, completion in enumerate(completions):
        positions = len(PROMPTS[i // 2]) + torch.arange(NEW)
        noise = reference.gumbel_noise(SEED + i, positions, NEW, VOCAB)
        tokens = noise.argmax(-1).tolist()
        last = next((at for at, token in enumerate(tokens) if token in ends), NEW)
        assert completion.token_ids == tokens[: last + 1]
    assert len({len(completion.token_ids) for completion in completions}) > 3


@torch.no_grad()
def test_every_draw_is_the_reference_s_at_its_own_position(engine):
    adapted, base = tiny_peft(), tiny_base("llama")  # which PEFT has not touched
    for i, tokens in enumerate(drawn(engine, temperature=1.5)):
        prompt = PROMPTS[i // 2]
        ids = torch.tensor([prompt + tokens])
        rows = [model(ids).logits[0, len(prompt) - 1 : -1] for model in (adapted, base)]
        positions = len(prompt) + torch.arange(NEW)
        want = reference.sample(
            *rows, -2.0, alpha=0.0, temperature=1.5, seed=SEED + i, position=positions
        )
        assert tokens == want.token.tolist()
