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
    r"must be finite.*got \[1.0, nan": lambda z, b: ops.steer(z, b, torch.tensor([1, math.nan, 1])),
    "strength must be finite, and in float32": lambda z, b: ops.topk(z, b, 3.5e38, 2),
    "at most 3.4e38; got -1000": lambda z, b: ops.sample(z, b, -(10**400)),
    r"at most 3.4e38; got 1e\+39": lambda z, b: ops.score(
        z, b, torch.tensor(1e39, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    ),
    "strength must be finite, .* inf": lambda z, b: ops.steer(z, b, math.inf),
    "penalty must be .* at least -3.4e38": lambda z, b: ops.steer(z, b, 1.0, penalty=-1e39),
    "temperature must be .* at most 3.4e38": lambda z, b: ops.sample(z, b, 1.0, temperature=1e39),
    "seed must be an integer of 64 bits; got inf": lambda z, b: ops.sample(z, b, 1, seed=math.inf),
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


def test_the_largest_strengths_of_float32_are_taken():
    z, b = rows()
    largest = torch.finfo(torch.float32).max
    for strength in (largest, -largest, 2**63, torch.tensor(largest, dtype=torch.float64)):
        ops.steer(z, z, strength)
    ops.steer(z, b, 0.0, penalty=-largest)


def views(*slices, width=220, rows=3):
    """Views of one buffer, and a tensor of its own."""
    buffer = torch.randn(rows, width)
    return *(buffer[s] for s in slices), torch.randn(3, 100)


ROW = slice(None)
PARTLY = {
    "one column on": lambda: views((ROW, slice(0, 100)), (ROW, slice(1, 101))),
    "one column back": lambda: views((ROW, slice(50, 150)), (ROW, slice(49, 149))),
    "half of the columns": lambda: views((ROW, slice(100, 200)), (ROW, slice(50, 150))),
    "one row on": lambda: views((slice(0, 3), slice(0, 100)), (slice(1, 4), slice(0, 100)), rows=4),
    "another stride": lambda: (
        (x := torch.randn(600))[:300].view(3, 100), x.as_strided((3, 100), (120, 1), 30),
        torch.randn(3, 100),
    ),
    "another stride alone": lambda: (
        (x := torch.randn(600))[:300].view(3, 100), x.as_strided((3, 100), (120, 1)),
        torch.randn(3, 100),
    ),
    "another dtype": lambda: (
        (x := torch.randn(3, 200))[:, :100], x.view(torch.bfloat16)[:, :100], torch.randn(3, 100)
    ),
    "an expanded row": lambda: (
        (x := torch.randn(3, 100))[1:2].expand(3, -1), x, torch.randn(3, 100)
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", PARTLY)
def test_out_that_overlaps_an_operand_in_part_is_refused(layout):
    rows, out, other = PARTLY[layout]()
    before = out.clone()
    for name, operands in (("adapted", (rows, other)), ("base", (other, rows))):
        with pytest.raises(ValueError, match=f"out must be {name} itself or share no memory"):
            ops.steer(*operands, 1.0, out=out)
    assert out.isclose(before, rtol=0, atol=0, equal_nan=True).all()


APART = {
    "columns beside": lambda: views((ROW, slice(0, 100)), (ROW, slice(100, 200))),
    "columns before": lambda: views((ROW, slice(110, 210)), (ROW, slice(10, 110))),
    "every other row": lambda: views(
        (slice(0, 6, 2), slice(0, 100)), (slice(1, 6, 2), slice(0, 100)), rows=6
    ),
    "rows after": lambda: views((slice(0, 3), slice(0, 100)), (slice(3, 6), slice(0, 100)), rows=6),
}


@pytest.mark.parametrize("layout", APART)
def test_out_may_lie_between_the_rows_of_an_operand(layout):
    rows, out, other = APART[layout]()
    want = ops.steer(rows.clone(), other, 2.0), ops.steer(other, rows.clone(), 2.0)
    assert torch.equal(ops.steer(rows, other, 2.0, out=out), want[0])
    assert torch.equal(ops.steer(other, rows, 2.0, out=out), want[1])
