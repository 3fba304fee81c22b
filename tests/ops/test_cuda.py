"""The CUDA C++ kernels where they are not as other backends: launches, workspace, in place."""

import pytest
import torch

from svd_engine.kernels import reference
from svd_engine.ops import cuda

from . import oracle, packed
from .cases import BF16, F16, F32, INF, NAN, OPERATORS, logits, options
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


FORMS = {  # on a device whose clusters have up to 16 blocks, up to 8, and without clusters
    "a block and a tile": (2, 2048, F16),
    "two blocks, one row invalid": (3, 5000, BF16),
    "as many as there are": (1, 90_000, F32),  # with 8 blocks in two rounds
}


@pytest.mark.parametrize("form", FORMS)
def test_one_launch_gives_the_bits_of_two(form, monkeypatch):
    runner = next((x for x in HERE if x.name == "cuda emulated"), None)
    if runner is None:
        pytest.skip("no nvcc")
    n, vocab, dtype = FORMS[form]
    z, b = logits(n, vocab, "cpu", dtype)
    z[:, 7], b[:, 9] = -INF, -INF
    if n > 2:
        z[1, 4097] = NAN
    o = options(z, alpha=1e-2, penalty=-1.0)
    with runner.running():
        for name, operator in OPERATORS.items():
            if n == 1 and operator.direction != "projected":
                continue
            got = {}
            for device, launches in ((0, 1), (1, 1), (2, 2)):
                monkeypatch.setattr(cuda, "_device_and_stream", lambda _, at=device: (at, 0))
                before = cuda._library().launches()
                got[device] = operator.run(z, b, o, "cuda", None)
                assert cuda._library().launches() - before == launches, name
            for device in (0, 1):
                pairs = zip(got[device], got[2], strict=True)
                assert all(oracle.same(x, y) for x, y in pairs), name


def test_few_rows_give_the_bits_of_many(device):
    """So many rows that they are two launches; alone a row is one."""
    z, b = (x.repeat(23, 1) for x in logits(3, 4200, device, BF16))
    for name, operator in OPERATORS.items():
        if operator.direction == "projected":
            oracle.alone(name, "cuda", z, b, options(z))


@pytest.mark.parametrize("odd", ["dtype", "vocabulary", "out"])
def test_rows_that_are_not_alike_are_two_launches(odd, device):
    z, b = logits(2, 5000 - (odd == "vocabulary"), device, F32, F16 if odd == "dtype" else F32)
    wide = torch.full((2, 5008), POISON, device=device)
    out = wide[:, 1 : 1 + z.shape[1]] if odd == "out" else torch.empty_like(z)
    before = getattr(cuda._library(), "launches", lambda: 0)()
    cuda.steer(z, b, packed.mask(2.0, 0.1), out)
    if device == "cpu":
        assert cuda._library().launches() - before == 2
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
