"""Steering over a vocabulary that two processes share, against whole rows."""

import functools

import pytest
import torch
from torch import distributed as dist
from torch.nn.functional import pad

from svd_engine.kernels import reference
from svd_engine.ops import sharded

from . import oracle
from .cases import DIFFERENCE, INF, OPERATORS, RECIPES
from .rows import logits
from .runners import SMALL

RANKS = 2
NAMES = [name for name in OPERATORS if name.split()[0].strip(",") in ("steer", "sample")]
# Few of the contract's recipes, since ranks wait for each other at every one.
KEPT = "no rows", "-inf in stretches", "spoilt rows: both", "ties: in order"
RECIPES_HERE = [r.number for r in RECIPES if r.number % 59 == 0 or r.name in KEPT]


def slices(*rows):
    """This rank's slice of each; the last one is padded with impossible tokens."""
    vocab = rows[0].shape[1]
    width = -(-vocab // RANKS)
    start = dist.get_rank() * width
    padded = (pad(x, (0, width * RANKS - vocab), value=-INF) for x in rows)
    return [x[:, start : start + width] for x in padded]


def whole(part, vocab):
    """The slices of all ranks side by side, without the padding."""
    parts = [torch.empty_like(part) for _ in range(RANKS)]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts, -1)[:, :vocab]


def run(name, z, b, o, backend, out):
    """An operator of `cases`, sharded."""
    mask = dict(alpha=o.alpha, penalty=o.penalty, direction=o.direction)
    if name == "steer":
        steered = whole(sharded.steer(*slices(z, b), o.mu, **mask), z.shape[1])
        return (steered.to(z.dtype) if out is None else out.copy_(steered),)
    cuts = dict(top_k=o.top_k, top_p=o.top_p, min_p=o.min_p) if name == "sample cut" else {}
    return sharded.sample(
        *slices(z, b), o.mu, **mask, **cuts, seed=o.seed, position=o.position,
        temperature=0.0 if name == "sample greedy" else o.temperature,
    )  # fmt: skip


def check_contract(name, number):
    """A case of the contract that backends keep, to their tolerance."""
    case = RECIPES[number].build("cpu", SMALL)
    known = oracle.answer(name, case, oracle.HOST)
    key = name.removesuffix(DIFFERENCE)
    with pytest.MonkeyPatch.context() as patch:
        sharded_one = OPERATORS[key]._replace(run=functools.partial(run, key))
        patch.setitem(OPERATORS, key, sharded_one)
        worst = oracle.check(name, "auto", case, oracle.HOST, known)
    assert worst.ratio <= 1, f"{name}, {case.name}: {worst.error:.3g} > {worst.tolerance:.3g}"


def check_draws(direction):
    """In float64, where no near tie is decided by a rounding: the very tokens of whole rows."""
    z, b = (x.double() for x in logits(200, 101, "cpu", spread=1.5))
    row = torch.arange(len(z))
    given = dict(
        strength=torch.linspace(-3, 3, len(z)), alpha=0.02, direction=direction, seed=row * 7,
        position=row + 2**33,
    )  # fmt: skip
    for cuts in ({}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 60, "top_p": 0.9}):
        for temperature in (0.0, 0.6, 1.7):
            got = sharded.sample(*slices(z, b), **given, **cuts, temperature=temperature)
            want = reference.sample(z, b, **given, **cuts, temperature=temperature)
            assert torch.equal(got.token, want.token)
            torch.testing.assert_close(got.logprob, want.logprob, rtol=1e-12, atol=1e-12)
            assert len(want.token.unique()) > 20


def check_bits():
    """The support and what is off it do not depend on the cut, and both ranks have one answer."""
    z, b = logits(64, 999, "cpu")
    for penalty in (-INF, -2.0):
        got = whole(sharded.steer(*slices(z, b), -3.0, penalty=penalty), 999)
        want = reference.steer(z, b, -3.0, penalty=penalty)
        off = z < z.amax(-1, keepdim=True) + reference.log_alpha(0.1)
        assert torch.equal(got[off], want[off]) and got[~off].isfinite().all()
    token, logprob = sharded.sample(*slices(z, b), -3.0, alpha=0.0, temperature=1.0)
    for mine in (token, logprob):
        every = whole(mine[None], 2 * len(mine)).view(RANKS, -1)
        assert torch.equal(every[0], every[1])


def check_arguments():
    z, b = logits(2, 10 + dist.get_rank(), "cpu")
    with pytest.raises(ValueError, match=r"must have one width; got \[10, 11\]. Pad the last"):
        sharded.steer(z, b, 1.0)
    with pytest.raises(ValueError, match="alpha must lie in"):
        sharded.sample(z, b, 1.0, alpha=2.0)


def check_group():
    """A group of this rank alone has whole rows."""
    alone = [dist.new_group([rank]) for rank in range(RANKS)][dist.get_rank()]
    z, b = logits(3, 10 + dist.get_rank(), "cpu")
    got = sharded.steer(z, b, 2.0, group=alone)
    torch.testing.assert_close(got, reference.steer(z, b, 2.0))


def work(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    for number in RECIPES_HERE:
        for name in NAMES:
            check_contract(name, number)
    for direction in reference.DIRECTIONS:
        check_draws(direction)
    check_bits()
    check_arguments()
    check_group()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(work, (tmp_path,), nprocs=RANKS)
