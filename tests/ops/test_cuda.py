"""The CUDA C++ kernels where they are not as other backends: blocks, workspace, in place."""

import pytest
import torch

from svd_engine.kernels import reference
from svd_engine.ops import cuda

from . import oracle, packed
from .cases import BF16, F16, F32, INF, NAN, OPERATORS, TILE, logits, options
from .oracle import POISON
from .runners import HERE

RUNNERS = [
    pytest.param(runner, id=str(runner), marks=[pytest.mark.gpu] * (runner.device == "cuda"))
    for runner in HERE
    if runner.backend == "cuda"
]


@pytest.fixture(params=RUNNERS)
def device(request):
    with request.param.running():
        yield request.param.device


def steer(z, b, strength=2.0, penalty=-INF, **where):
    out = torch.full_like(z, POISON)
    cuda.steer(z, b, packed.mask(strength, 0.1, penalty), out, **where)
    return out


@pytest.mark.parametrize("penalty", [-INF, -3.0])
def test_in_place(penalty, device):
    z, b = logits(2, 5000, device)
    want = steer(z, b, penalty=penalty)
    delta = torch.empty_like(z)
    cuda.steering_vector(z, b, "projected", delta)
    for at in (0, 1):
        rows = [z.clone(), b.clone()]
        cuda.steer(*rows, packed.mask(2.0, 0.1, penalty), rows[at])
        assert torch.equal(rows[at], want)
        rows = [z.clone(), b.clone()]
        cuda.steering_vector(*rows, "projected", rows[at])
        assert torch.equal(rows[at], delta)


def test_the_workspace_is_optional_and_checked(device):
    z, b = logits(2, 300, device)
    size = cuda.workspace_size(*z.shape)
    out = steer(z, b, workspace=torch.full((size,), NAN, device=device))
    assert torch.equal(out, steer(z, b))
    with pytest.raises(AssertionError, match=f"{size} needed"):
        steer(z, b, workspace=torch.empty(size - 4, device=device))


def test_a_block_takes_several_tiles_of_many_rows(device):
    """So many rows that a block of `steer` takes two tiles, and four."""
    z, b = logits(1, 6000, device)
    want = steer(z, b)
    for n in (700,) if device == "cpu" else (700, 2800):
        many = steer(z.expand(n, 6000).contiguous(), b.expand(n, 6000))
        assert torch.equal(many, want.expand(n, 6000))


@pytest.mark.parametrize("tiles", [44, 132])
def test_the_sums_of_many_tiles(tiles, device):
    """A lane joins those of two tiles, and of more than it loads ahead."""
    z, b = logits(1, tiles * TILE - 5, device)
    z[:, 7], b[:, 9] = -INF, -INF
    torch.testing.assert_close(steer(z, b), reference.steer(z, b, 2.0), rtol=1e-5, atol=1e-5)
    gap = torch.zeros(1, device=device)
    cuda.divergence(z, b, gap)
    torch.testing.assert_close(gap, reference.divergence(z, b), rtol=1e-5, atol=1e-5)


def test_few_rows_give_the_bits_of_many(device):
    z, b = (x.repeat(23, 1) for x in logits(3, 4200, device, BF16))
    for name, operator in OPERATORS.items():
        if operator.direction == "projected":
            oracle.alone(name, "cuda", z, b, options(z))


@pytest.mark.parametrize("odd", ["dtype", "vocabulary", "out"])
def test_rows_that_are_not_alike(odd, device):
    z, b = logits(2, 5000 - (odd == "vocabulary"), device, F32, F16 if odd == "dtype" else F32)
    wide = torch.full((2, 5008), POISON, device=device)
    out = wide[:, 1 : 1 + z.shape[1]] if odd == "out" else torch.empty_like(z)
    cuda.steer(z, b, packed.mask(2.0, 0.1), out)
    want = reference.steer(z, b, 2.0)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert odd != "out" or ((wide[:, :1] == POISON).all() and (wide[:, 5001:] == POISON).all())


def test_a_strength_or_target_that_is_none(device):
    """On a device they are not looked at before: the row is lost, and nothing else is read."""
    z, b = logits(3, 4500, device)
    strength = torch.tensor([NAN, 1.0, 1.0], device=device)
    target = torch.tensor([0, -1, 4500], device=device)
    out = [torch.zeros(3, device=device) for _ in range(4)]
    inside = torch.ones(3, dtype=torch.bool, device=device)
    cuda.score(z, b, packed.mask(strength), target, out[0])
    assert out[0].isnan().all()
    cuda.project_strength(z, b, target, 0.1, "projected", *out[1:], inside)
    assert out[1].isnan().tolist() == [False, True, True] and not inside[1:].any()
    best, token = torch.zeros(3, 3, device=device), torch.zeros(3, 3, dtype=int, device=device)
    cuda.topk(z, b, packed.mask(strength), 3, best, token)
    assert (token[:, 0] == -1).tolist() == [True, False, False]


def test_without_temperature_nothing_is_cut(device):
    z, b = logits(3, 2500, device)
    token, logprob = torch.zeros(3, dtype=int, device=device), torch.zeros(3, device=device)
    cuda.sample(z, b, packed.mask(2.0), packed.draw(0.0, 0, 0, 1, 0.1, 0.9), token, logprob)
    assert torch.equal(token, reference.sample(z, b, 2.0).token)
