"""After `warmup` no request compiles a kernel, whatever its size, its strides or its numbers."""

import itertools
import math

import pytest
import torch

pytest.importorskip("triton")

import triton

from svd_engine.kernels import launch

from . import packed

pytestmark = pytest.mark.slow

BF16, FLOAT = torch.bfloat16, torch.float32
KERNELS = [x for x in vars(launch) if x[0] != "_" and x.endswith(("_tiles", "_rows"))]
NUMBERS = torch.zeros(210)
TOKENS = torch.zeros(210, dtype=torch.int64)


@pytest.fixture
def compiled(monkeypatch):
    """What Triton would compile: kernel, argument types, options. No size is part of it."""
    asked = set()

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            assert grid[0] > 0
            return self.run

        def run(self, *arguments, **options):
            kinds = [x.dtype if isinstance(x, torch.Tensor) else "number" for x in arguments]
            assert not any(x is None for x in arguments)  # it would specialise
            asked.add((self.name, *kinds, *sorted(options.items())))

    for name in KERNELS:
        monkeypatch.setattr(launch, name, Kernel(name))
    return asked


def rows(n, vocab, dtype, lead, pad):
    return torch.empty(n * (vocab + pad) + lead, dtype=dtype)[lead:].as_strided(
        (n, vocab), (vocab + pad, 1)
    )


def every_request(vocab, dtypes):
    either = lambda n, values: (values[0].item(), values[:n])  # noqa: E731
    layouts = list(itertools.product((0, 1, 8), (0, 1, 8)))
    for n, z_dtype, b_dtype in itertools.product((1, 2, 16, 70), dtypes, dtypes):
        for (lead, pad), other in itertools.product(layouts, [(0, 0), (1, 3)]):
            z, b = rows(n, vocab, z_dtype, lead, pad), rows(n, vocab, b_dtype, *other)
            token, number = TOKENS[:n], NUMBERS[:n]
            launch.divergence(z, b, number)
            listed = TOKENS, *[NUMBERS] * 6, TOKENS
            launch.support(z, b, token, 0.1, "projected", 2, *listed)
            launch.steering_vector(z, b, "projected", rows(n, vocab, FLOAT, lead, pad))
            for alpha, mu, penalty in itertools.product(
                (0.0, 0.1), either(n, NUMBERS), (-math.inf, -2.0, 0.0)
            ):
                by = packed.mask(mu, alpha, penalty)
                terms = number, number, number, number > 0
                launch.project_strength(z, b, token, alpha, "projected", *terms)
                for dtype in dtypes:
                    out = rows(n, vocab, dtype, lead, pad)
                    launch.steer(z, b, by, out)
                launch.score(z, b, by, token, number)
                launch.topk(z, b, by, 3, NUMBERS[: 3 * n], TOKENS[: 3 * n])
                for temperature, seed, at in itertools.product(
                    (0.0, 0.7), either(n, TOKENS), either(n, TOKENS)
                ):
                    for cuts in ((), (5, 0.9, 0.1)):
                        draw = packed.draw(temperature, seed, at, *cuts)
                        launch.sample(z, b, by, draw, token, number)


@pytest.mark.parametrize(
    ("vocab", "dtypes"), [(512, [BF16]), (515, [FLOAT]), (5000, [BF16, FLOAT]), (1, [BF16])]
)
def test_warmup_compiles_what_requests_need(vocab, dtypes, compiled):
    launch.warmup(vocab, dtypes, "cpu")
    warm = set(compiled)
    assert {x[0] for x in warm} == set(KERNELS)
    compiled.clear()
    every_request(vocab, dtypes)
    assert compiled <= warm
    assert warm <= compiled, "compiled for nothing"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_after_warmup_triton_compiles_nothing(monkeypatch):
    from svd_engine import ops

    compiled = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **info: compiled.append(info["repr"])
    )
    vocab = 3001
    ops.warmup(vocab, (FLOAT, BF16), "cuda")
    assert compiled
    compiled.clear()
    for n, dtype in itertools.product((1, 2, 3, 15, 16, 33, 200), (FLOAT, BF16)):
        z, b = torch.randn(2, n, vocab, device="cuda").to(dtype)
        target = torch.zeros(n, dtype=torch.int64, device="cuda")
        on = dict(backend="triton")
        for penalty in (-math.inf, -1.0):
            ops.steer(z, b, 1.0, penalty=penalty, **on)
            ops.topk(z, b, torch.ones(n, device="cuda"), 3, penalty=penalty, **on)
            ops.score(z, b, 2.0, target, penalty=penalty, **on)
            for temperature in (0.0, 1.0):
                ops.sample(z, b, 1.0, penalty=penalty, temperature=temperature, seed=n, **on)
        ops.sample(z, b, 1.0, temperature=1.0, top_k=n, position=n, **on)
        ops.steering_vector(z, b, **on)
        ops.project_strength(z, b, target, **on)
        ops.divergence(z, b, **on)
    torch.cuda.synchronize()
    assert compiled == []
