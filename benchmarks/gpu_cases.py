"""The operators in one form, and the inputs that the contract names."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svd_engine import ops
from svd_engine.ops import dispatch

INF, NAN = math.inf, math.nan
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Options:
    """Every argument that some operator takes; tensors are `[N]` on the device of the rows."""

    target: Tensor
    seed: int | Tensor = 0
    position: int | Tensor = 0
    mu: float | Tensor = 2.0
    alpha: float = 0.1
    penalty: float = -INF
    temperature: float = 0.8
    k: int = 8

    def row(self, i: int) -> "Options":
        """The options of one row alone."""
        tensors = {k: v[i : i + 1] for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


Outputs = tuple[Tensor, ...]
Operate = Callable[[Tensor, Tensor, Options, str, Tensor | None], Outputs]


class Operator(NamedTuple):
    """`run(adapted, base, options, backend, out)`; `registered` is its name in `dispatch`."""

    run: Operate
    registered: str


def _mask(o: Options) -> dict[str, Any]:
    return {"alpha": o.alpha, "penalty": o.penalty}


def _sampler(noisy: bool, **cuts: Any) -> Operate:
    def run(z: Tensor, b: Tensor, o: Options, backend: str, out: Tensor | None) -> Outputs:
        return ops.sample(
            z, b, o.mu, **_mask(o), **cuts, temperature=o.temperature if noisy else 0.0,
            seed=o.seed, position=o.position, backend=backend,
        )  # fmt: skip

    return run


def _steer(z: Tensor, b: Tensor, o: Options, backend: str, out: Tensor | None) -> Outputs:
    return (ops.steer(z, b, o.mu, **_mask(o), out=out, backend=backend),)


def _score(z: Tensor, b: Tensor, o: Options, backend: str, out: Tensor | None) -> Outputs:
    return (ops.score(z, b, o.mu, o.target, **_mask(o), backend=backend),)


def _topk(z: Tensor, b: Tensor, o: Options, backend: str, out: Tensor | None) -> Outputs:
    return ops.topk(z, b, o.mu, min(o.k, z.shape[1]), **_mask(o), backend=backend)


OPERATORS: dict[str, Operator] = {
    "steer": Operator(_steer, "steer"),
    "sample greedy": Operator(_sampler(noisy=False), "sample"),
    "sample noisy": Operator(_sampler(noisy=True), "sample"),
    "sample cut": Operator(_sampler(True, top_k=50, top_p=0.95, min_p=0.01), "sample"),
    "score": Operator(_score, "score"),
    "topk": Operator(_topk, "topk"),
    "project_strength": Operator(
        lambda z, b, o, backend, out: ops.project_strength(
            z, b, o.target, alpha=o.alpha, backend=backend
        ),
        "project_strength",
    ),
    "divergence": Operator(
        lambda z, b, o, backend, out: (ops.divergence(z, b, backend=backend),), "divergence"
    ),
    "steering_vector": Operator(
        lambda z, b, o, backend, out: (ops.steering_vector(z, b, backend=backend),),
        "steering_vector",
    ),
}


def absent(name: str, backend: str, device: str) -> str | None:
    """Why a backend does not have an operator; None where it does."""
    try:
        dispatch.choose(OPERATORS[name].registered, backend, torch.device(device))
    except ValueError as error:
        return str(error)
    return None


def options(z: Tensor, **given: Any) -> Options:
    """Targets that are likely in even rows and anything in odd ones; a seed a row."""
    rows = torch.arange(len(z), device=z.device)
    likely = z.float().nan_to_num(-1e9, -1e9, -1e9).argmax(-1)
    target = torch.where(rows % 2 == 0, likely, rows * 7919 % z.shape[1])
    return Options(**({"target": target, "seed": rows + 3, "position": rows * 5 + 2**32} | given))


class Case(NamedTuple):
    name: str
    z: Tensor
    b: Tensor
    options: Options


def logits(
    n: int, vocab: int, device: str, dtype: torch.dtype = F32, base: torch.dtype | None = None,
    spread: float = 3.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Drawn on the CPU, so that they are the same everywhere."""
    generator = torch.Generator().manual_seed(n * 1_000_003 + vocab)
    z = torch.randn(n, vocab, generator=generator) * spread
    b = z + torch.randn(n, vocab, generator=generator)
    return z.to(dtype).to(device), b.to(base or dtype).to(device)


def impossible(z: Tensor, b: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Nine rows with -inf wherever it has been got wrong: in one row, in both, in whole tiles."""
    z[0, :tile] = -INF
    z[1, tile:] = -INF
    b[2, : 2 * tile] = -INF
    z[3, 10:-10] = b[3, 10:-10] = -INF
    b[4] = -INF  # no opinion at all
    z[5], z[5, -10] = -INF, -4.0  # one token
    b[6, z[6].argmax()] = -INF
    z[7, ::2], b[7, 1::2] = -INF, -INF
    z[8, :-1] = b[8, :-1] = -INF
    return z, b


def cases(device: str, quick: bool) -> Iterator[Case]:
    """Small vocabularies only if quick. What matters most comes first."""

    def case(name: str, z: Tensor, b: Tensor, **given: Any) -> Case:
        return Case(name, z, b, options(z, **given))

    for vocab in (1, 7, 8, 100, 2047, 2048, 2049, 50257, 151936):
        if vocab < 50000 or not quick:
            yield case(f"float32, V = {vocab}", *logits(3, vocab, device))
    for dtype, vocab in ((BF16, 2304), (F16, 2304), (BF16, 50257), (BF16, 151936)):
        if vocab < 50000 or not quick:
            yield case(f"{str(dtype)[6:]}, V = {vocab}", *logits(3, vocab, device, dtype))
    yield from _values(case, device)
    yield from _settings(case, device, quick)
    yield from _layouts(case, device, quick)
    for mix in ((BF16, F32), (F32, F16), (F16, BF16)):
        name = f"{str(mix[0])[6:]} and {str(mix[1])[6:]}, V = 2301"
        yield case(name, *logits(2, 2301, device, *mix))


def _layouts(case: Callable[..., Case], device: str, quick: bool) -> Iterator[Case]:
    z, b = logits(3, 2056, device, BF16)
    wide = torch.full((3, 2080), NAN, dtype=BF16, device=device)
    for lead, name in ((0, "padded"), (1, "padded, unaligned"), (8, "padded, offset by 16 bytes")):
        view = wide[:, lead : lead + 2056]
        view.copy_(z)
        yield case(f"{name}: [:, {lead}:V + {lead}]", view, b)
    odd = torch.full((6, 2057), NAN, dtype=BF16, device=device)[::2, :2056]
    odd.copy_(b)
    yield case("every other row of an odd width", z, odd)
    yield case("base expanded, stride 0", z, b[:1].expand(3, -1))
    yield case("both expanded, stride 0", z[:1].expand(3, -1), b[:1].expand(3, -1))
    yield case("transposed storage", z.t().contiguous().t(), b)
    yield case("no rows", z[:0], b[:0])
    yield case("300 rows, V = 1000", *logits(300, 1000, device))
    if not quick:
        z, b = logits(3, 151936, device, BF16)
        wide = torch.full((3, 152064), NAN, dtype=BF16, device=device)
        wide[:, :151936] = z
        yield case("padded, V = 151936 of 152064", wide[:, :151936], b)


def _values(case: Callable[..., Case], device: str) -> Iterator[Case]:
    z, b = logits(5, 4800, device)
    for row, tokens in enumerate([(7, 8), (3, 2047), (2047, 2048), (100, 4000), (1, 1024)]):
        z[row, list(tokens)], b[row, list(tokens)] = 50.0, 48.0
    yield case("ties: two tokens", z, b)
    yield case("ties: flat rows", torch.ones_like(z), torch.zeros_like(b))
    for vocab in (4800, 4801):
        z, b = impossible(*logits(9, vocab, device), 2048)
        yield case(f"-inf in tiles, one row or both, V = {vocab}", z, b)
        yield case(f"-inf, alpha = 0, V = {vocab}", z, b, alpha=0.0)
        yield case(f"-inf, penalty = -1, V = {vocab}", z, b, penalty=-1.0)
    z, b = logits(5, 4500, device)
    z[0, 5] += 500.0  # p of the rest underflows
    z[1, 5] += 500.0
    b[1, 6] += 500.0
    z[2] -= 1e4
    b[3] += 1e4
    yield case("underflow and large logits", z, b)
    yield case("underflow and large logits, alpha = 0", z, b, alpha=0.0)
    for where in ("adapted", "base"):
        for value in (NAN, INF):
            z, b = logits(6, 4500, device)
            z[:, 70] = -INF
            z[5] = -INF
            spoilt = z if where == "adapted" else b
            spoilt[1, 0] = spoilt[1, 4499] = value
            spoilt[2, 70] = value  # base: where the adapted row is -inf
            spoilt[3] = value
            for penalty in (-INF, -1.0):
                name = f"{value} in {where}, penalty = {penalty}"
                yield case(name, z, b, penalty=penalty)


def _settings(case: Callable[..., Case], device: str, quick: bool) -> Iterator[Case]:
    z, b = logits(3, 4500, device, spread=1.0)
    z[1] = 0.25  # flat: every token is support at any alpha
    z[2] = z[2].round()  # many at the top
    for alpha in (0.0, 1e-6, 0.5, 1.0):
        yield case(f"alpha = {alpha}, a flat row among them", z, b, alpha=alpha)
    z, b = logits(3, 2500, device)
    each = torch.tensor([-20.0, 0.0, 3.0], device=device)
    for penalty in (-INF, -2.0, 0.0):
        for mu in (-20.0, 0.0, each):
            name = "a strength a row" if isinstance(mu, Tensor) else f"strength = {mu}"
            yield case(f"{name}, penalty = {penalty}", z, b, mu=mu, penalty=penalty)
    z, b = (x.expand(8, -1) for x in logits(1, 60, device, spread=1.0))
    rows = torch.arange(8, device=device)
    draw = {"alpha": 0.05, "temperature": 1.5}
    yield case("seeds beyond 32 bits", z, b, seed=rows * 2**33 - 7, position=3, **draw)
    yield case("positions beyond 32 bits", z, b, seed=-1, position=rows + 2**32, **draw)
    yield case("one seed and position", z, b, seed=2**62 + 1, position=2**32 - 1, **draw)
    if not quick:
        z, b = logits(2, 151936, device, BF16, spread=0.0)
        yield case("flat, V = 151936, alpha = 0", z, b, alpha=0.0)
        yield case("flat, V = 151936, alpha = 0.1", z, b)
        yield case("penalty = -2, V = 151936", *logits(2, 151936, device, BF16), penalty=-2.0)
