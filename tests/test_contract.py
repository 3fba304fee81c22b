"""The contract of docs/operators.md: every operator, every backend that runs here, case by case.

Accuracy is earned: a backend errs no more than the reference does in float32, but for a rounding.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svd_engine import ops
from svd_engine.kernels import reference
from svd_engine.ops import dispatch

INF, NAN = math.inf, math.nan
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [
    name
    for name in (*dispatch.MODULES, "reference")
    if dispatch.unavailable(name) is None
    and (name == "reference" or dispatch.import_module(dispatch.MODULES[name]).takes(DEVICE))
]
OPERATORS = {
    "steering_vector": lambda z, b, mu, o, **k: o.steering_vector(z, b, **k),
    "steer": lambda z, b, mu, o, **k: o.steer(z, b, mu, alpha=0.05, **k),
    "steer, finite penalty": lambda z, b, mu, o, **k: o.steer(z, b, mu, penalty=-2.0, **k),
    "steer, alpha 0": lambda z, b, mu, o, **k: o.steer(z, b, mu, alpha=0.0, **k),
    "sample": lambda z, b, mu, o, **k: o.sample(z, b, mu, **k),
    "sample, finite penalty": lambda z, b, mu, o, **k: o.sample(z, b, mu, penalty=-1.0, **k),
    "sample, noisy": lambda z, b, mu, o, **k: o.sample(
        z, b, mu, alpha=0.01, temperature=1.3, seed=7, position=11, **k
    ),
    "sample, cut": lambda z, b, mu, o, **k: o.sample(
        z, b, mu, alpha=0.0, temperature=1.5, top_k=9, top_p=0.8, min_p=0.01, seed=5, **k
    ),
    "topk": lambda z, b, mu, o, **k: o.topk(z, b, mu, min(5, z.shape[1]), **k),
    "score": lambda z, b, mu, o, **k: o.score(z, b, mu, targets(z), **k),
    "score, penalty 0": lambda z, b, mu, o, **k: o.score(z, b, mu, targets(z), penalty=0.0, **k),
    "project_strength": lambda z, b, mu, o, **k: o.project_strength(z, b, targets(z), **k),
    "divergence": lambda z, b, mu, o, **k: o.divergence(z, b, **k),
}
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_operator = pytest.mark.parametrize("operator", OPERATORS)


@pytest.fixture(autouse=True, scope="module")
def poison():
    """What an operator allocates begins as NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def rows(n=3, v=700, dtype=torch.float32, base_dtype=None, spread=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = spread * torch.randn(n, v, generator=generator)
    b = z + torch.randn(n, v, generator=generator)
    return z.to(DEVICE, dtype), b.to(DEVICE, base_dtype or dtype)


def targets(z):
    """The likeliest token of the first row, others as they come."""
    ids = torch.arange(len(z), device=z.device) * 5 % z.shape[1]
    if len(z):
        ids[0] = z[0].float().nan_to_num(0, 0, -9).argmax()
    return ids


def check(operator, backend, z, b, mu=-3.0):
    """The backend's answer against float64; returns it."""
    call = OPERATORS[operator]
    got = call(z, b, mu, ops, backend=backend)
    wide = torch.as_tensor(mu, dtype=torch.float64, device=z.device)
    truth = call(z.double(), b.double(), wide, reference)
    narrow = call(z.float(), b.float(), mu, reference)
    finite = [x.double().nan_to_num(0, 0, 0) for x in (z, b)]
    scale = 1 + finite[0].abs().max() + wide.abs().max() * (finite[0] - finite[1]).abs().max()
    tuples = [x if isinstance(x, tuple) else (x,) for x in (got, truth, narrow)]
    for g, t, n in zip(*tuples, strict=True):
        if not g.is_floating_point():
            assert torch.equal(g, n), f"{g} against {n}"
            continue
        rounding = torch.finfo(g.dtype).eps if g.dtype.itemsize == 2 else 0.0
        g, n = g.double(), n.double()
        assert torch.equal(g.isnan(), t.isnan())
        assert torch.equal(g == -INF, t == -INF)
        shown = t.isfinite()
        allowed = (n - t).abs() + 1e-6 * scale + rounding * t.abs()
        assert ((g - t).abs() <= allowed)[shown].all(), float((g - t).abs()[shown].max())
    return got


@each_backend
@each_operator
@pytest.mark.parametrize("dtypes", ["f32 f32", "bf16 bf16", "f16 f16", "bf16 f32", "f32 f16"])
def test_dtypes_in_any_mix(operator, backend, dtypes):
    known = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
    check(operator, backend, *rows(2, 300, *(known[name] for name in dtypes.split())))


@each_backend
@each_operator
@pytest.mark.parametrize("vocab", [1, 7, 2049, 50257])
def test_any_vocabulary(operator, backend, vocab):
    check(operator, backend, *rows(1 if vocab > 5000 else 2, vocab))


@each_backend
@each_operator
def test_strides_padding_expansion_and_alignment(operator, backend):
    z, b = rows(4, 711)
    check(operator, backend, z[:, :700], b[::2].repeat(2, 1)[:, 3:703])
    check(operator, backend, z[::2, 1:701], b[1::2, :700])
    check(operator, backend, z[:1, :700].expand(3, 700), b[:3, 5:705])


@each_backend
@each_operator
def test_no_rows(operator, backend):
    got = OPERATORS[operator](*(x[:0] for x in rows()), 1.0, ops, backend=backend)
    assert all(len(x) == 0 for x in (got if isinstance(got, tuple) else (got,)))


@each_backend
@each_operator
def test_stretches_of_impossible_tokens(operator, backend):
    for part in (slice(0, 600), slice(100, 700), slice(1, None, 2)):
        z, b = rows()
        z[0, part] = z[1, part] = b[1, part] = -INF
        check(operator, backend, z, b)


@each_backend
@each_operator
def test_impossible_in_one_row_alone(operator, backend):
    z, b = rows()
    z[0, ::3] = -INF
    b[1, ::3] = -INF
    b[2] = -INF
    check(operator, backend, z, b)


@each_backend
@each_operator
def test_underflow(operator, backend):
    z, b = rows(spread=60.0)
    z[0, 1:], b[0, 1:] = -3e4, -2e4
    check(operator, backend, z, b)


@each_backend
@each_operator
@pytest.mark.parametrize("bad", ["nan adapted", "inf adapted", "nan base", "inf base", "nothing"])
def test_a_bad_row_alone_is_lost(operator, backend, bad):
    z, b = rows()
    clean = OPERATORS[operator](z, b, -3.0, ops, backend=backend)
    value, _, row = bad.partition(" ")
    if bad == "nothing":
        z[1] = -INF
    else:
        z[1, 650] = -INF if row == "base" else z[1, 650]  # seen even where p is 0
        (z if row == "adapted" else b)[1, 650] = float(value)
    got = check(operator, backend, z, b)
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (got, clean)), strict=True)
    for dirty, before in pairs:
        assert torch.equal(dirty[[0, 2]], before[[0, 2]])


@each_backend
@each_operator
def test_ties_go_to_the_lowest_token(operator, backend):
    z = torch.zeros(2, 700, device=DEVICE)
    z[0, [650, 20, 300]] = 4.0
    got = check(operator, backend, z, z.clone(), mu=2.0)
    if operator in ("sample", "topk"):
        assert got.token.reshape(2, -1)[:, 0].tolist() == [20, 0]


@each_backend
@each_operator
def test_the_batch_does_not_matter(operator, backend):
    z, b = rows(5, 3000)
    together = OPERATORS[operator](z, b, -3.0, ops, backend=backend)
    for i in (0, 3):
        if "score" in operator or "project" in operator:
            continue  # their targets depend on the place
        alone = OPERATORS[operator](z[i : i + 1], b[i : i + 1], -3.0, ops, backend=backend)
        pairs = (x if isinstance(x, tuple) else (x,) for x in (alone, together))
        for one, all_ in zip(*pairs, strict=True):
            if backend == "reference":  # torch's own sums may round by the batch
                torch.testing.assert_close(one[0], all_[i])
            else:
                assert torch.equal(one[0], all_[i])


@each_backend
@each_operator
def test_a_strength_a_row(operator, backend):
    z, b = rows(4)
    check(operator, backend, z, b, mu=torch.tensor([-20.0, 0.0, 3.0, 1e-3], device=DEVICE))


@each_backend
@each_operator
@pytest.mark.parametrize("strength", [-20.0, 0.0, 3.0])
def test_strengths(operator, backend, strength):
    check(operator, backend, *rows(), mu=strength)


@each_backend
@pytest.mark.parametrize("alpha", [0.0, 1e-6, 1.0])
def test_flat_rows_and_wide_supports(backend, alpha):
    z, b = rows(2, 5000, spread=0.01)
    truth = reference.sample(z, b, -3.0, alpha=alpha)
    got = ops.sample(z, b, -3.0, alpha=alpha, backend=backend)
    assert torch.equal(got.token, truth.token)
    torch.testing.assert_close(got.logprob, truth.logprob)
    k = 40
    best = ops.topk(z, b, -3.0, k, alpha=alpha, backend=backend)
    assert torch.equal(best.token, reference.topk(z, b, -3.0, k, alpha=alpha).token)
    for cuts in (dict(top_k=300), dict(top_p=0.7), dict(min_p=0.99), dict(top_p=0.5, top_k=50)):
        drawn = ops.sample(z, b, -3.0, alpha=alpha, temperature=1.0, backend=backend, **cuts)
        truth = reference.sample(z, b, -3.0, alpha=alpha, temperature=1.0, **cuts)
        assert torch.equal(drawn.token, truth.token), cuts


@each_backend
def test_noise_is_of_seed_position_and_token(backend):
    z, b = rows(1, 300)
    z, b = z.expand(6, 300), b.expand(6, 300)
    seeds = torch.tensor([1, 1, 2, 1, 1 << 40, 1], device=DEVICE)
    positions = torch.tensor([5, 5, 5, 6, 5, 1 << 40], device=DEVICE)
    draw = dict(alpha=0.0, temperature=50.0, seed=seeds, position=positions)
    got = ops.sample(z, b, 1.0, backend=backend, **draw).token
    assert torch.equal(got, reference.sample(z, b, 1.0, **draw).token)
    assert got[0] == got[1] and len(set(got.tolist())) == 5


@each_backend
def test_a_small_support_fills_topk_with_the_lowest_ids(backend):
    z, b = rows(1, 300)
    z[0, 200] = 50.0
    got = ops.topk(z, b, 1.0, 4, backend=backend)
    assert got.token.tolist() == [[200, 0, 1, 2]]
    assert got.logprob[0, 1:].tolist() == [-INF] * 3


@each_backend
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40),
    st.integers(0, 2**31),
    st.floats(-20, 20),
    st.integers(-16, 16),
)
def test_properties(backend, values, seed, strength, shift):
    on = dict(backend=backend)
    noise = torch.Generator().manual_seed(seed)
    z = torch.tensor([values])
    b = (z + torch.randn(z.shape, generator=noise)).to(DEVICE)
    z = z.to(DEVICE)
    near = dict(atol=1e-4, rtol=1e-4)

    delta = ops.steering_vector(z, b, **on)
    assert abs(float(delta.sum())) < 1e-4
    torch.testing.assert_close(ops.steering_vector(z + shift, b - shift, **on), delta, **near)

    unsteered = ops.steer(z, b, 0.0, **on)
    kept = unsteered.isfinite()
    assert torch.equal(unsteered[kept], z[kept])

    steered = ops.steer(z, b, strength, **on)
    drawn, best = ops.sample(z, b, strength, **on), ops.topk(z, b, strength, 1, **on)
    assert torch.equal(drawn.token, best.token[:, 0])
    torch.testing.assert_close(drawn.logprob, best.logprob[:, 0], **near)
    scored = ops.score(z, b, strength, drawn.token, **on)
    torch.testing.assert_close(scored, steered.log_softmax(-1).amax(-1), **near)

    order = torch.randperm(z.shape[1], generator=noise).to(DEVICE)
    moved = order[ops.sample(z[:, order], b[:, order], strength, **on).token]
    assert float(steered[0, moved]) >= float(steered.max()) - 1e-4  # but for near ties
