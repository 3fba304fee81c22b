"""What the operators accept: bad arguments raise before any work."""

import math

import pytest
import torch

from svd_engine import ops
from svd_engine.ops import dispatch

from .cases import logits


def rows():
    return logits(3, 100, "cpu")


def _elsewhere(z, b):
    """The Triton backend with a device that it does not take."""
    return dispatch.choose("steer", "triton", torch.device("meta"))


BAD = {
    "adapted must be a tensor": lambda z, b: ops.steer([1.0], b, 1.0),
    "adapted must have shape": lambda z, b: ops.steer(z[0], b, 1.0),
    "base must be one of": lambda z, b: ops.steer(z, b.long(), 1.0),
    "must have one shape": lambda z, b: ops.steer(z, b[:, :50], 1.0),
    "float64": lambda z, b: ops.steer(z.double(), b.double(), 1.0),
    "strength must be finite": lambda z, b: ops.steer(z, b, math.nan),
    "strength must be a number or have shape": lambda z, b: ops.steer(z, b, torch.ones(2)),
    "strength must be finite; got": lambda z, b: ops.steer(z, b, torch.tensor([1.0, math.nan, 1])),
    "alpha must lie": lambda z, b: ops.steer(z, b, 1.0, alpha=1.5),
    "alpha must lie in": lambda z, b: ops.steer(z, b, 1.0, alpha=math.nan),
    "penalty must be": lambda z, b: ops.steer(z, b, 1.0, penalty=1.0),
    "out must be": lambda z, b: ops.steer(z, b, 1.0, out=torch.empty(3, 99)),
    "out must have strides": lambda z, b: ops.steer(z, b, 1.0, out=torch.empty(100, 3).T),
    "temperature must be": lambda z, b: ops.sample(z, b, 1.0, temperature=-1.0),
    "top_k must be": lambda z, b: ops.sample(z, b, 1.0, top_k=-1),
    "top_p must lie": lambda z, b: ops.sample(z, b, 1.0, top_p=0.0),
    "min_p must lie": lambda z, b: ops.sample(z, b, 1.0, min_p=2.0),
    "seed must be an integer": lambda z, b: ops.sample(z, b, 1.0, seed=torch.ones(3)),
    "k must lie": lambda z, b: ops.topk(z, b, 1.0, 101),
    "target must be int64": lambda z, b: ops.score(z, b, 1.0, torch.zeros(3)),
    "target must hold": lambda z, b: ops.score(z, b, 1.0, torch.tensor([0, 100, 0])),
    "backend must be one of": lambda z, b: ops.steer(z, b, 1.0, backend="gpu"),
    "seed must be an integer of 64": lambda z, b: ops.sample(z, b, 1.0, seed=2**63),
    "has no steer for meta": lambda z, b: _elsewhere(z, b),
}


@pytest.mark.parametrize("message", BAD)
def test_refusals(message):
    with pytest.raises(ValueError, match=message):
        BAD[message](*rows())
