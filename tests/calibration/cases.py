"""Random examples, an engine for them, and what it computes in float64 from whole rows."""

import random

import numpy as np
import pytest
import torch

from svd_engine import SteeredEngine
from svd_engine.kernels import reference
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
