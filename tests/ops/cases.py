"""The operators in one form, and the one list of inputs on which every backend is tested.

`RECIPES` is the list: a case that is added to it reaches every backend, here and on a GPU.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svd_engine import ops
from svd_engine.kernels import reference
from svd_engine.ops import dispatch

from . import rows
from .rows import BF16, F16, F32, INF, NAMES, NAN, TILE, Inputs, Scale, likeliest, logits

EVERY = 10**9  # as k: the whole vocabulary


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
    top_k: int = 50
    top_p: float = 0.95
    min_p: float = 0.01
    k: int = 8
    capacity: int = 40
    direction: str = "projected"

    def row(self, i: int) -> "Options":
        """The options of row i."""
        tensors = {k: v[i : i + 1] for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


DEFAULTS = {field.name: field.default for field in fields(Options)}
Outputs = tuple[Tensor, ...]
Operate = Callable[[Tensor, Tensor, Options, str, Tensor | None], Outputs]


class Operator(NamedTuple):
    """`run(adapted, base, options, backend, out)`; `registered` is its name in `dispatch`."""

    run: Operate
    registered: str
    reads: frozenset[str] = frozenset()  # which options
    direction: str = "projected"


def _along(operator: Operator, direction: str) -> Operator:
    """The operator in another direction."""
    run = operator.run

    def turned(z: Tensor, b: Tensor, o: Options, *rest: Any) -> Outputs:
        return run(z, b, replace(o, direction=direction), *rest)

    return operator._replace(run=turned, direction=direction)


def _mask(o: Options) -> dict[str, Any]:
    return {"alpha": o.alpha, "penalty": o.penalty, "direction": o.direction}


def _sampler(noisy: bool, cut: bool) -> Operate:
    def run(z: Tensor, b: Tensor, o: Options, backend: str, out: Tensor | None) -> Outputs:
        cuts: dict[str, Any] = {"top_k": o.top_k, "top_p": o.top_p, "min_p": o.min_p} if cut else {}
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


def _project(z: Tensor, b: Tensor, o: Options, backend: str, out: Tensor | None) -> Outputs:
    at = dict(alpha=o.alpha, direction=o.direction)
    return ops.project_strength(z, b, o.target, **at, backend=backend)


def _support(z: Tensor, b: Tensor, o: Options, backend: str, out: Tensor | None) -> Outputs:
    at = dict(alpha=o.alpha, direction=o.direction, capacity=min(o.capacity, z.shape[1] + 1))
    return ops.support(z, b, o.target, **at, backend=backend)


def _divergence(z: Tensor, b: Tensor, o: Options, backend: str, out: Tensor | None) -> Outputs:
    return (ops.divergence(z, b, backend=backend),)


def _vector(z: Tensor, b: Tensor, o: Options, backend: str, out: Tensor | None) -> Outputs:
    return (ops.steering_vector(z, b, direction=o.direction, backend=backend),)


_STEERED = frozenset({"mu", "alpha", "penalty"})
_NOISY = _STEERED | {"temperature", "seed", "position"}
_PROJECTED: dict[str, Operator] = {
    "steer": Operator(_steer, "steer", _STEERED),
    "sample greedy": Operator(_sampler(False, False), "sample", _STEERED),
    "sample noisy": Operator(_sampler(True, False), "sample", _NOISY),
    "sample cut": Operator(_sampler(True, True), "sample", _NOISY | {"top_k", "top_p", "min_p"}),
    "score": Operator(_score, "score", _STEERED | {"target"}),
    "topk": Operator(_topk, "topk", _STEERED | {"k"}),
    "project_strength": Operator(_project, "project_strength", frozenset({"alpha", "target"})),
    "divergence": Operator(_divergence, "divergence"),
    "steering_vector": Operator(_vector, "steering_vector"),
    "support": Operator(_support, "support", frozenset({"alpha", "target", "capacity"})),
}
DIFFERENCE = ", difference"  # ends the name of an operator in that direction
OPERATORS = _PROJECTED | {
    name + DIFFERENCE: _along(operator, "difference")
    for name, operator in _PROJECTED.items()
    if name != "divergence"
}


def absent(name: str, backend: str, device: str) -> str | None:
    """Why a backend does not have an operator; None where it does."""
    operator = OPERATORS[name]
    try:
        module = dispatch.choose(operator.registered, backend, torch.device(device))
    except ValueError as error:
        return str(error)
    if operator.direction not in getattr(module, "DIRECTIONS", reference.DIRECTIONS):
        return f"it has no direction {operator.direction}"
    return None


def options(z: Tensor, **given: Any) -> Options:
    """Targets that are likely in even rows and anything in odd ones; a seed per row."""
    row = torch.arange(len(z), device=z.device)
    target = torch.where(row % 2 == 0, likeliest(z), row * 7919 % z.shape[1])
    return Options(**({"target": target, "seed": row + 3, "position": row * 5 + 2**32} | given))


class Case(NamedTuple):
    name: str
    z: Tensor
    b: Tensor
    options: Options
    lead: int = 0  # the columns before `out` of `steer`


class Recipe(NamedTuple):
    """How a case is made. `given`: options, or functions of the adapted rows that give them."""

    name: str
    inputs: Inputs
    given: Mapping[str, Any]
    operators: frozenset[str]  # those that it asks something that no recipe before it has
    alike: bool = False  # to those before it: of these a slow runner takes a share
    number: int = 0
    large: int = 0  # its vocabulary, where that is fixed and a quick run leaves it out
    lead: int = 0

    def build(self, device: str, tile: int = TILE) -> Case:
        z, b = self.inputs(Scale(device, tile))
        given = {k: v(z) if callable(v) else v for k, v in self.given.items()}
        return Case(self.name, z, b, options(z, **given), self.lead)


def cases(device: str, quick: bool) -> Iterator[tuple[Case, frozenset[str]]]:
    """Each case with the operators that it asks something new. What matters most comes first.

    If quick: small vocabularies, and none of the cases that are like those before them.
    """
    for recipe in sorted(RECIPES, key=lambda recipe: recipe.alike):
        if not (quick and (recipe.large or recipe.alike)):
            yield recipe.build(device), recipe.operators


def _label(given: Mapping[str, Any]) -> str:
    words = (
        f"{key} = {getattr(value, '__name__', value)}".replace("_", " ")
        for key, value in given.items()
    )
    return ", ".join(words)


def _each(name: str, inputs: Inputs, *given: Mapping[str, Any], **also: Any) -> Iterator[Recipe]:
    """One recipe for each set of options, by default for the default ones alone."""
    asked, alike = set(), also.pop("alike", False)
    for i, options in enumerate(given or ({},)):
        new = set()
        for operator, (_, _, reads, _) in OPERATORS.items():
            changed = {k: v for k, v in options.items() if k in reads and v != DEFAULTS.get(k)}
            question = operator, *sorted(changed.items(), key=lambda item: item[0])
            if question not in asked:
                new.add(operator)
            asked.add(question)
        label = f"{name}; {_label(options)}" if options else name
        yield Recipe(label, inputs, options, frozenset(new), alike or i > 0, **also)


BOTH = {"alpha": 0.0, "penalty": -2.0}  # every token is support, and the penalty is unread


def _numbers(z: Tensor) -> Tensor:
    return torch.arange(len(z), device=z.device)


def one_seed_each(z: Tensor) -> Tensor:
    return _numbers(z) * 2**33 - 7


def one_seed_for_two(z: Tensor) -> Tensor:
    return _numbers(z) // 2 << 40


def any_seed(z: Tensor) -> Tensor:
    return _numbers(z) * 0x1E3779B97F4A7C15 - 2**62  # wraps


def one_position_each(z: Tensor) -> Tensor:
    return _numbers(z) * 5 + 2**32


def far_position(z: Tensor) -> Tensor:
    return _numbers(z) * 2**59


def one_per_row(z: Tensor) -> Tensor:
    return torch.tensor([-20.0, 0.0, 3.0, 1e-3], device=z.device).repeat(len(z))[: len(z)]


def _vocabularies() -> Iterator[Recipe]:
    few = {"k": 2, "mu": -3.0, "penalty": 0.0}
    sizes: dict[str, Callable[[Scale], int]] = {str(v): lambda s, v=v: v for v in (1, 7, 8, 100)}
    sizes |= {
        "an eighth of a tile": lambda s: s.of(256), "a third of a tile": lambda s: s.of(704),
        "one tile - 1": lambda s: s.tile - 1, "one tile": lambda s: s.tile,
        "one tile + 1": lambda s: s.tile + 1, "two tiles": lambda s: 2 * s.tile,
        "2.4 tiles": lambda s: s.of(5000),
    }  # fmt: skip
    for vocab, size in sizes.items():
        for dtype in (F32, BF16, F16):
            name = f"{NAMES[dtype]}, V = {vocab}"
            inputs = lambda s, size=size, dtype=dtype: s.logits(3, size(s), dtype)  # noqa: E731
            several = ({}, few, BOTH | {"k": EVERY if size(Scale("cpu")) < 300 else 30})
            yield from _each(
                name, inputs, *(several if dtype == F32 else ({},)), alike=dtype != F32
            )
    for vocab in (49152, 50257, 151936):
        for dtype in (F32, BF16, F16):
            name = f"{NAMES[dtype]}, V = {vocab}"
            inputs = lambda s, v=vocab, dtype=dtype: s.logits(2, v, dtype)  # noqa: E731
            given = ({}, few, BOTH | {"k": 300}) if dtype == F32 else ({},)
            yield from _each(name, inputs, *given, large=vocab)


def _dtypes() -> Iterator[Recipe]:
    several = {"mu": 3.0}, {"penalty": -2.5}, {"alpha": 0.0}
    for odd in (0, 3):
        for z in NAMES:
            for b in NAMES:
                if odd or z != b:
                    name = f"{NAMES[z]} and {NAMES[b]}, V {'odd' if odd else 'a multiple of 8'}"
                    inputs = lambda s, odd=odd, z=z, b=b: s.logits(2, s.of(2304) - odd, z, b)  # noqa: E731
                    yield from _each(name, inputs, *several, alike=True)
    yield from _each("float32 and bfloat16, V = 300", lambda s: s.logits(2, 300, F32, BF16))


def _minus_infinity() -> Iterator[Recipe]:
    strengths = tuple({"mu": mu, "alpha": a} for a in (0.1, 0.0) for mu in (-20.0, 0.0, 3.0))
    several = ({"mu": 3.0}, {"alpha": 0.0, "k": 30, "temperature": 1.0}, {"penalty": -1.0},
               {"k": EVERY}, BOTH)  # fmt: skip
    for odd in (0, 1):
        inputs = lambda s, odd=odd: rows.impossible(*s.logits(9, s.of(4800) + odd), s.tile)  # noqa: E731
        name = f"-inf in tiles, one row or both, V = 2.3 tiles + {odd}"
        yield from _each(name, inputs, *several, alike=bool(odd))
    more = (*strengths, {"penalty": -1.0, "k": EVERY}, {"alpha": 0.0, "k": EVERY})
    yield from _each("-inf in stretches", rows.stretches, {}, *more)


def _equality() -> Iterator[Recipe]:
    counts = tuple({"k": k, "alpha": a} for k in (1, 2, 40, 300) for a in (0.0, 0.9))
    for odd in (0, 1):
        inputs = lambda s, odd=odd: rows.ties(s, odd)  # noqa: E731
        name = f"ties: two tokens, V = 2.3 tiles + {odd}"
        masks = {"mu": 3.0}, {"alpha": 0.0}, {"penalty": -1.0}
        yield from _each(name, inputs, *masks, alike=bool(odd))
    ones = lambda s: tuple(x.expand(5, -1) for x in (  # noqa: E731
        torch.ones(1, s.of(4800), device=s.device), torch.zeros(1, s.of(4800), device=s.device)
    ))  # fmt: skip
    yield from _each("ties: flat rows", ones)
    edge = ({}, {"alpha": 0.0, "k": 7}, {"alpha": 1.0, "k": EVERY},
            {"alpha": 1.0, "penalty": 0.0, "k": EVERY}, {"alpha": 0.0, "k": EVERY})  # fmt: skip
    yield from _each("ties: flat and rounded rows", rows.flat, *edge)
    yield from _each("ties: in order", rows.orders, {}, *counts, {"k": EVERY}, {"penalty": -1.0})
    yield from _each(
        "ties: equal tails", rows.tails, {}, {"alpha": 1.0}, {"alpha": 0.0, "k": EVERY}
    )


def least_likely(z: Tensor) -> Tensor:
    return z.nan_to_num(0.0, 0.0, 0.0).argmin(-1)


def most_likely(z: Tensor) -> Tensor:
    return likeliest(z)


def in_the_middle(z: Tensor) -> Tensor:
    return torch.full((len(z),), z.shape[1] * 2 // 3, device=z.device)


def last(z: Tensor) -> Tensor:
    return torch.full((len(z),), z.shape[1] - 1, device=z.device)


def _extremes() -> Iterator[Recipe]:
    several = ({"mu": 3.0}, {"alpha": 0.0, "temperature": 1.0}, {"penalty": -1.0})
    yield from _each("underflow and large logits", rows.underflow, *several)
    yield from _each("shifted, near and large rows", rows.shifted, *several)
    yield from _each("logits of 1e30", rows.huge, {"mu": 3.0})
    whole = _cut(0, 1.0, 0.0)  # which of the flat row's near ties is cut is a matter of rounding
    yield from _each("near-certain rows", rows.certain, *(
        whole | {"alpha": alpha, "target": target}
        for alpha in (0.0, 1e-4, 0.5) for target in (most_likely, least_likely)
    ))  # fmt: skip
    yield from _each("support pushed below the rest", rows.pushed, *(
        {"mu": mu, "penalty": 0.0, "target": in_the_middle} for mu in (1e6, 3e6)
    ))  # fmt: skip


SPOILT = "spoilt rows"


def _invalid() -> Iterator[Recipe]:
    several = ({}, {"penalty": -1.0}, {"alpha": 0.0}, {"temperature": 1.0} | _cut(3, 0.9, 0.1),
               _cut(0, 0.5, 0.0), _cut(0, 1.0, 0.1))  # fmt: skip
    for where, row in enumerate(("adapted", "base")):
        for value in (NAN, INF):
            inputs = lambda s, where=where, value=value: rows.spoilt(s, where, value)  # noqa: E731
            yield from _each(f"{SPOILT}: {value} in {row}", inputs, *several)
    every = ({}, {"penalty": -5.0, "k": EVERY}, {"alpha": 0.0, "k": EVERY})
    yield from _each(f"{SPOILT}: both", rows.spoilt_in_both, *every)


def _settings() -> Iterator[Recipe]:
    yield from _each("a flat row among others", rows.some_flat, *(
        {"alpha": alpha, "penalty": penalty, "temperature": 1.0}
        for penalty in (-INF, -2.0) for alpha in (0.0, 1e-6, 0.5, 1.0)
    ))  # fmt: skip
    yield from _each("every seventh token -inf", rows.gaps, *(
        {"mu": mu, "alpha": alpha, "penalty": penalty, "temperature": 1.3}
        for mu in (-20.0, 0.0, 3.0, one_per_row) for alpha in (0.0, 1e-6, 0.1, 1.0)
        for penalty in (-INF, -1000.0, -0.5, 0.0)
    ))  # fmt: skip
    plain = lambda s: s.logits(3, s.of(2496))  # noqa: E731
    yield from _each("strengths", plain, *(
        {"mu": mu, "penalty": p} for p in (-INF, -2.0) for mu in (-20.0, 0.0, 3.0, one_per_row)
    ), {"k": EVERY, "alpha": 0.3}, {"k": EVERY, "penalty": -1.0}, {"target": last},
        *({"capacity": c, "alpha": a} for c in (1, 7, EVERY) for a in (0.0, 0.1)))  # fmt: skip
    wide = lambda s: s.logits(2, s.of(4992), spread=0.01)  # noqa: E731
    cuts = ({"top_k": 300}, {"top_p": 0.7}, {"min_p": 0.99}, {"top_p": 0.5, "top_k": 50})
    no_cuts = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0, "k": 40}
    yield from _each("wide supports", wide, *(
        no_cuts | cut | {"alpha": alpha} for alpha in (0.0, 1e-6, 1.0) for cut in cuts
    ))  # fmt: skip
    ones = lambda s: tuple(x.expand(10, -1) for x in s.logits(1, 60, spread=1.0))  # noqa: E731
    draw = {"alpha": 0.05, "temperature": 1.5}
    yield from _each("draws", ones, *(
        draw | {"seed": seed, "position": position} for seed, position in (
            (one_seed_each, one_position_each), (one_seed_each, 3), (2**62 + 1, one_position_each),
            (-1, 2**33), (0, 0), (0, 1), (1, 0), (one_seed_for_two, 1 << 40),
            (any_seed, far_position), (2**63 - 1, -(2**63)),
        )
    ), {"temperature": 50.0, "alpha": 0.0}, {"temperature": 0.3}, {"temperature": 2.5})  # fmt: skip
    flat = lambda s: logits(2, 151936, s.device, BF16, spread=0.0)  # noqa: E731
    yield from _each("flat, V = 151936", flat, {}, {"alpha": 0.0}, large=151936)
    many = lambda s: logits(2, 151936, s.device, BF16)  # noqa: E731
    yield from _each("penalty = -2, V = 151936", many, {"penalty": -2.0}, large=151936)


CUTS = [(3, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.2), (4, 0.7, 0.05), (1, 1.0, 0.0), (0, 1e-6, 0.0),
        (0, 1.0, 1.0), (10**9, 0.999, 1e-9), (0, 0.8, 0.0), (6, 0.6, 0.02), (20, 0.9, 0.02),
        (0, 0.97, 0.0), (999, 1.0, 1e-9)]  # fmt: skip


def _cut(top_k: int, top_p: float, min_p: float) -> dict[str, Any]:
    return {"top_k": top_k, "top_p": top_p, "min_p": min_p}


def _cuts() -> Iterator[Recipe]:
    yield from _each("cuts", rows.repeated, *(
        _cut(*cuts) | more for more in (
            {"alpha": 0.01, "temperature": 1.0}, {"alpha": 0.0, "temperature": 1.0},
            {"alpha": 0.01, "temperature": 2.5, "penalty": -1.0},
        ) for cuts in CUTS
    ), {"alpha": 0.0, "temperature": 2.5, "penalty": -1.0, "mu": one_per_row})  # fmt: skip
    for vocab in (72, 200, 1200):  # they fit the list of a CUDA block, or not
        fours = vocab // 4
        share = 1 / (fours + 3 * fours / math.e)  # of a token at 1
        inputs = lambda s, v=vocab: rows.equals(s, v)  # noqa: E731
        yield from _each(f"equals at the cut, V = {vocab}", inputs, *(
            _cut(*cuts) | {"alpha": 0.0, "temperature": 1.0} for cuts in (
                (5, 1.0, 0.0), (fours + 2, 1.0, 0.0), (0, 2.5 * share, 0.0),
                (0, fours * share + 1.5 * share / math.e, 0.0), (0, 1.0, 0.9), (2, 1.0, 0.0),
                (0, 0.4, 0.0), (150, 1.0, 0.0), (0, 0.4, 0.5),
            )
        ), alike=vocab > 72, large=vocab if vocab > 1000 else 0)  # fmt: skip
    yield from _each("cuts of large supports", rows.large_supports, *(
        _cut(*cuts) | {"alpha": 0.0} for cuts in ((133, 1.0, 0.0), (0, 0.93, 0.3))
    ), _cut(0, 0.5, 0.0) | {"alpha": 0.0, "penalty": 0.0, "temperature": 0.01})  # fmt: skip
    most = lambda s: (lambda z, b: (z.index_fill(0, torch.tensor([1], device=z.device), 1.0), b))(  # noqa: E731
        *logits(2, 50257, s.device, spread=1.0)
    )
    yield from _each("cuts that keep many tokens, V = 50257", most, *(
        _cut(*cuts) | {"alpha": 0.0, "temperature": 1.3}
        for cuts in ((0, 0.95, 0.0), (2000, 1.0, 0.0), (9000, 0.999, 0.0), (0, 1.0, 1e-4))
    ), large=50257)  # fmt: skip


def _layouts() -> Iterator[Recipe]:
    for lead, name in ((0, "padded"), (1, "padded, unaligned"), (8, "padded, offset by 16 bytes")):
        inputs = lambda s, lead=lead: rows.view(s, lead)  # noqa: E731
        yield from _each(f"{name}: [:, {lead}:V + {lead}]", inputs, lead=lead)
    yield from _each("base padded, unaligned", lambda s: rows.view(s, 3, base=True), lead=3)
    yield from _each("every other row of an odd width", rows.odd)
    yield from _each("slices of rows and columns", rows.slices)
    plain = lambda s: s.logits(3, s.of(2304), BF16)  # noqa: E731
    first = lambda x: x[:1].expand(3, -1)  # noqa: E731
    yield from _each("base expanded, stride 0", lambda s: (plain(s)[0], first(plain(s)[1])))
    yield from _each("both expanded, stride 0", lambda s: tuple(map(first, plain(s))))
    turned = lambda x: x.t().contiguous().t()  # noqa: E731
    yield from _each("transposed storage", lambda s: (turned(plain(s)[0]), plain(s)[1]))
    yield from _each("no rows", lambda s: tuple(x[:0] for x in plain(s)))
    yield from _each("many rows", lambda s: s.logits(s.of(9600) // 32, s.of(1000)), alike=True)
    padded = lambda s: (lambda z, b: (torch.cat([z, z[:, :128] * NAN], 1)[:, :151936], b))(  # noqa: E731
        *logits(3, 151936, s.device, BF16)
    )
    yield from _each("padded, V = 151936 of 152064", padded, large=151936)


def _recipes() -> Iterator[Recipe]:
    yield from _vocabularies()
    yield from _minus_infinity()
    yield from _equality()
    yield from _extremes()
    yield from _invalid()
    yield from _settings()
    yield from _cuts()
    yield from _layouts()
    yield from _dtypes()


RECIPES = tuple(recipe._replace(number=i) for i, recipe in enumerate(_recipes()))
