"""The contract of docs/operators.md: every backend, every case, every operator."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svd_engine import ops
from svd_engine.kernels import reference
from svd_engine.kernels.arguments import Draw, Mask
from svd_engine.ops import dispatch

from . import oracle
from .cases import BF16, F16, F32, INF, NAN, OPERATORS, RECIPES, TILE, logits, options
from .runners import HERE, RUNNERS, Runner

# numpy, which Triton's interpreter computes with, remarks on every -inf - -inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
FAST = range(0, len(RECIPES), 160)  # the recipes that every runner takes in the fast lane


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The references are many small parallel regions, slow where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.lru_cache(maxsize=2)
def built(number, device, tile):
    return RECIPES[number].build(device, tile)


@functools.lru_cache(maxsize=2)
def known(operator, number, device, tile, slack):
    return oracle.answer(operator, built(number, device, tile), slack)


def contract():
    """Runners change fastest, so that what they share is computed once."""
    fast = [runner for runner in HERE if not runner.slow][-1:]  # of the CPU's the best
    for device, tile in sorted({(runner.device, runner.tile) for runner in HERE}):
        runners = [runner for runner in HERE if (runner.device, runner.tile) == (device, tile)]
        for recipe in RECIPES:
            for operator in OPERATORS:
                for runner in runners:
                    if runner.takes(recipe, operator):
                        marks = [pytest.mark.gpu] if device == "cuda" else []
                        is_quick = runner in fast and recipe.number % 3 == 0 and not recipe.large
                        if recipe.number not in FAST and not is_quick:
                            marks.append(pytest.mark.slow)
                        label = f"{runner}-{operator}-{recipe.name}"
                        yield pytest.param(runner, operator, recipe.number, id=label, marks=marks)


@pytest.mark.parametrize(("runner", "operator", "number"), list(contract()))
def test_contract(runner, operator, number):
    case = built(number, runner.device, runner.tile)
    answer = known(operator, number, runner.device, runner.tile, runner.slack)
    with runner.running():
        worst = oracle.check(operator, runner.backend, case, runner.slack, answer)
    assert worst.ratio <= 1, f"error {worst.error:.3g}, tolerance {worst.tolerance:.3g}"


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_runs_here(runner: Runner):
    """A runner that is left out of the contract shows."""
    reason = runner.why_not()
    if reason is not None:
        pytest.skip(reason)
    assert runner in HERE


def _each(runner):
    marks = [pytest.mark.gpu] if runner.device == "cuda" else [pytest.mark.slow] * runner.slow
    return pytest.param(runner, id=str(runner), marks=marks)


each_runner = pytest.mark.parametrize("runner", [_each(x) for x in HERE if x.others > 1])
each_operator = pytest.mark.parametrize("operator", OPERATORS)


def on_device(runner, *rows):
    """Rows on the runner's device, and which backend."""
    return *(x.to(runner.device) for x in rows), {"backend": runner.backend}


BATCHES = {  # rows, vocabulary, dtypes, options
    "float32": (5, 3000, (F32,), {}),
    "float32, odd": (5, 3001, (F32,), {"penalty": -1.0}),
    "bfloat16": (4, 3008, (BF16,), {"alpha": 0.0, "top_k": 0, "top_p": 0.8, "min_p": 0.0}),
    "mixed, wide support": (3, 3008, (F16, F32), {"alpha": 1e-3, "temperature": 0.7}),
}


@each_runner
@each_operator
@pytest.mark.parametrize("batch", BATCHES)
def test_a_row_is_the_same_to_the_bit_in_any_batch(batch, operator, runner):
    n, vocab, dtypes, given = BATCHES[batch]
    z, b = logits(n, vocab * runner.tile // TILE, runner.device, *dtypes)
    with runner.running():
        if runner.bitwise:
            oracle.alone(operator, runner.backend, z, b, options(z, **given))
        else:  # torch's own sums may round by the batch
            o = options(z, **given)
            together = OPERATORS[operator].run(z, b, o, runner.backend, None)
            single = OPERATORS[operator].run(z[1:2], b[1:2], o.row(1), runner.backend, None)
            for one, several in zip(single, together, strict=True):
                torch.testing.assert_close(one[0], several[1])


@each_runner
@each_operator
@pytest.mark.parametrize(
    ("where", "value"),
    [("adapted", NAN), ("adapted", INF), ("adapted", -INF), ("base", NAN), ("base", INF)],
)
def test_a_bad_row_leaves_the_others_to_the_bit(where, value, operator, runner):
    z, b = logits(3, 704 * runner.tile // TILE, runner.device)
    z[1, 3], o = -INF, options(z)
    spoilt = {"adapted": z, "base": b}[where].clone()
    spoilt[1, slice(None) if value == -INF else 3] = value  # base: where p is 0
    rows = (spoilt, b) if where == "adapted" else (z, spoilt)
    with runner.running():
        clean = OPERATORS[operator].run(z, b, o, runner.backend, None)
        dirty = OPERATORS[operator].run(*rows, o, runner.backend, None)
    for got, want in zip(dirty, clean, strict=True):
        assert torch.equal(got[[0, 2]], want[[0, 2]])
        lost = got[1].isnan() if got.is_floating_point() else got[1] <= 0  # -1 or False
        assert lost.all()


@each_runner
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("lead", [0, 1, 8])
def test_out_takes_any_dtype_and_stride(lead, dtype, runner):
    vocab = 2304 * runner.tile // TILE
    z, b, on = on_device(runner, *logits(2, vocab, "cpu", BF16))
    b[1, 5] = NAN
    for penalty in (-INF, -2.0):
        with runner.running():
            wide = ops.steer(z.float(), b.float(), 3.0, penalty=penalty, **on)
            buffer = torch.full((2, lead + vocab + 8), 7.0, dtype=dtype, device=z.device)
            out = buffer[:, lead : lead + vocab]
            assert ops.steer(z, b, 3.0, penalty=penalty, out=out, **on) is out
        assert (buffer[:, :lead] == 7).all() and (buffer[:, lead + vocab :] == 7).all()
        assert out[1].isnan().all()
        oracle.check_narrow(out, wide, dtype, runner.slack)


@each_runner
@pytest.mark.parametrize("at", [0, 1])
def test_out_may_be_an_operand_itself(at, runner):
    rows = [*on_device(runner, *logits(3, 2304 * runner.tile // TILE, "cpu"))[:2]]
    with runner.running():
        want = ops.steer(*rows, 3.0, penalty=-1.0, backend=runner.backend)
        got = ops.steer(*rows, 3.0, penalty=-1.0, out=rows[at], backend=runner.backend)
    assert got is rows[at] and torch.equal(got, want)


STEERED = {  # and what follows the mask
    "steer": (None,),
    "sample": (Draw(0.0, 0, 1.0, 0.0, (0, None), (0, None)),),
    "sample, noisy": (Draw(0.7, 0, 1.0, 0.0, (0, None), (0, None)),),
    "sample, cut": (Draw(0.7, 5, 0.9, 0.01, (0, None), (0, None)),),
    "topk": (5,),
    "score": (torch.zeros(4, dtype=torch.int64),),
}


@each_runner
@pytest.mark.parametrize("penalty", [-INF, -1.0])
def test_a_strength_that_is_not_finite_gives_a_nan_row(penalty, runner):
    """`ops` refuses one that it can read; on a device it reads none."""
    z, b, _ = on_device(runner, *logits(4, 70, "cpu"))
    strength = torch.tensor([2.0, NAN, INF, -INF], device=z.device)
    mask = Mask((0.0, strength), 0.1, penalty)
    for name, rest in STEERED.items():
        rest = [x.to(z.device) if isinstance(x, torch.Tensor) else x for x in rest]
        with runner.running():
            got = dispatch.launch(name.split(",")[0], runner.backend, (z, b, mask, *rest))
        for x in got:
            lost = x.isnan() if x.is_floating_point() else x == -1
            assert lost[1:].all() and not lost[0].any(), name


COLD = [  # temperature, mask, cuts
    (1e-30, {"alpha": 0.1}, {}),
    (1e-38, {"alpha": 0.0}, {}),
    (5e-324, {"penalty": -1.0}, {}),
    (1e-30, {"penalty": -1.0}, {"top_k": 40, "top_p": 0.9, "min_p": 0.1}),
    (1.2e-38, {"alpha": 0.1}, {"top_p": 0.5}),
    (1e-42, {"alpha": 0.0}, {"top_k": 3}),
]


@each_runner
@pytest.mark.parametrize("temperature, mask, cuts", COLD)
def test_the_coldest_draw_is_the_greedy_token(temperature, mask, cuts, runner):
    """However cold: the quotient of a logit and the temperature overflows, or that is 0 itself."""
    z, b, on = on_device(runner, *logits(3, 70, "cpu"))
    z[0], b[0] = z[0] * 1e30, b[0] * 1e-30
    # Some steered logits exceed every adapted one.
    greedy = reference.steer(z.double(), b.double(), -40.0, **mask).argmax(-1)
    draw = dict(temperature=temperature, seed=3, position=torch.arange(3, device=z.device))
    with runner.running():
        got = ops.sample(z, b, -40.0, **mask, **draw, **cuts, **on)
    assert torch.equal(got.token, greedy) and got.logprob.isfinite().all()


@each_runner
@pytest.mark.parametrize("lead", [0, 1, 8])
def test_steering_vector_is_written_in_place(lead, runner):
    """The backends take rows to write to; `ops` has no argument for them."""
    if runner.backend == "reference":
        pytest.skip("returns what it computes")
    z, b, on = on_device(runner, *logits(2, 2304 * runner.tile // TILE, "cpu"))
    n, vocab = z.shape
    buffer = torch.full((n, lead + vocab + 8), 7.0, device=z.device)
    out = buffer[:, lead : lead + vocab]
    with runner.running():
        runner.module.steering_vector(z, b, out)
        assert torch.equal(out, ops.steering_vector(z, b, **on))
    assert (buffer[:, :lead] == 7).all() and (buffer[:, lead + vocab :] == 7).all()


@each_runner
def test_ties_go_to_the_lowest_token(runner):
    z = torch.zeros(2, 700)
    z[0, [650, 20, 300]] = 4.0
    z, b, on = on_device(runner, z, z.clone())
    with runner.running():
        best = ops.topk(z, b, 2.0, 5, **on).token
        assert best.tolist() == [[20, 300, 650, 0, 1], [0, 1, 2, 3, 4]]
        assert ops.sample(z, b, 2.0, **on).token.tolist() == [20, 0]


@each_runner
def test_a_small_support_fills_topk_with_the_lowest_ids(runner):
    z, b, on = on_device(runner, *logits(1, 300, "cpu"))
    z[0, 200] = 50.0
    with runner.running():
        got = ops.topk(z, b, 1.0, 4, **on)
    assert got.token.tolist() == [[200, 0, 1, 2]]
    assert got.logprob[0, 1:].tolist() == [-INF] * 3


@each_runner
def test_noise_is_of_seed_position_and_token(runner):
    z, b, on = on_device(runner, *(x.expand(6, 300) for x in logits(1, 300, "cpu")))
    seeds = torch.tensor([1, 1, 2, 1, 1 << 40, 1], device=z.device)
    positions = torch.tensor([5, 5, 5, 6, 5, 1 << 40], device=z.device)
    draw = dict(alpha=0.0, temperature=50.0, seed=seeds, position=positions)
    with runner.running():
        got = ops.sample(z, b, 1.0, **draw, **on).token
    assert torch.equal(got, reference.sample(z, b, 1.0, **draw).token)
    assert got[0] == got[1] and len(set(got.tolist())) == 5


@each_runner
@pytest.mark.parametrize("given", [{}, {"alpha": 0.0}, {"penalty": -1.0}])
def test_no_cut_is_sample_and_the_logprob_is_the_score(given, runner):
    z, b, on = on_device(runner, *logits(4, 160, "cpu"))
    for temperature in (0.0, 0.8):
        draw = dict(temperature=temperature, seed=5, position=torch.arange(4, device=z.device))
        with runner.running():
            plain = ops.sample(z, b, 3.0, **draw, **given, **on)
            scored = ops.score(z, b, 3.0, plain.token, **given, **on)
            torch.testing.assert_close(scored, plain.logprob, rtol=1e-6, atol=1e-6)
            for cut in ({"top_k": 160}, {"top_p": 1 - 1e-12}, {"min_p": 1e-30}):
                drawn = ops.sample(z, b, 3.0, **draw, **given, **cut, **on)
                assert torch.equal(drawn.token, plain.token)
                torch.testing.assert_close(drawn.logprob, plain.logprob, rtol=1e-6, atol=1e-6)


@each_runner
@pytest.mark.parametrize("alpha", [0.0, 1e-4, 0.5])
def test_the_variance_of_near_certain_rows_is_right_in_proportion(alpha, runner):
    z, b, on = on_device(runner, *logits(3, 300, "cpu"))
    z[1] = 0.25
    z[2, 100] = 12.0
    target = torch.tensor([5, 100, 100], device=z.device)
    with runner.running():
        got = ops.project_strength(z, b, target, alpha=alpha, **on)
    want = reference.project_strength(z.double(), b.double(), target, alpha=alpha)
    torch.testing.assert_close(got.newton.double(), want.newton, rtol=2e-5, atol=0)


@each_runner
def test_logits_near_the_largest_float_crash_nothing(runner):
    """Ids stay in range where the steered logits are no numbers."""
    z, b, on = on_device(runner, *logits(2, 150, "cpu"))
    for strength in (1e38, -1e38):
        with runner.running():
            rows = z * 1e37, b * -1e37
            best = ops.topk(*rows, strength, 40, alpha=0.0, **on).token
            cut = dict(temperature=1.0, top_k=5, top_p=0.5)
            drawn = ops.sample(*rows, strength, alpha=0.0, **cut, **on).token
        for token in (best, drawn):
            assert (token >= -1).all() and (token < 150).all()


@each_runner
def test_offsets_beyond_31_bits(runner, monkeypatch):
    """Rows 2**30 elements apart, of which hardly any is touched."""
    if runner.backend == "reference":
        pytest.skip("computes on float32 copies")
    if "interpreted" in runner.name:  # its copy back of arguments would touch every byte
        interpreter = pytest.importorskip("triton.runtime.interpreter")
        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    stride, vocab = 2**30 + 16, 100
    try:
        buffer = torch.empty(2 * stride + vocab, dtype=BF16, device=runner.device)
    except RuntimeError as error:
        pytest.skip(str(error))
    far = buffer.as_strided((3, vocab), (stride, 1))
    z, b = logits(3, vocab, runner.device, BF16)
    far.copy_(z)
    with runner.running():
        for name, (run, _, _) in OPERATORS.items():
            near = run(z, b, options(z), runner.backend, None)
            for rows in ((far, b), (z, far)):
                if rows[0] is z:
                    near = run(z, z, options(z), runner.backend, None)
                got = run(*rows, options(z), runner.backend, far if name == "steer" else None)
                assert all(oracle.same(x, y) for x, y in zip(got, near, strict=True)), name
                far.copy_(z)


PROPERTIES = {runner.backend: runner for runner in HERE if runner.tile == TILE}


@pytest.mark.slow
@pytest.mark.parametrize("backend", PROPERTIES)
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40),
    st.integers(0, 2**31),
    st.floats(-20, 20),
    st.integers(-16, 16),
)
def test_properties(backend, values, seed, strength, shift):
    runner = PROPERTIES[backend]
    noise = torch.Generator().manual_seed(seed)
    z = torch.tensor([values])
    z, b, on = on_device(runner, z, z + torch.randn(z.shape, generator=noise))
    order = torch.randperm(z.shape[1], generator=noise).to(z.device)
    near = dict(atol=1e-4, rtol=1e-4)
    with runner.running():
        delta = ops.steering_vector(z, b, **on)
        moved = ops.steering_vector(z + shift, b - shift, **on)
        unsteered = ops.steer(z, b, 0.0, **on)
        steered = ops.steer(z, b, strength, **on)
        drawn, best = ops.sample(z, b, strength, **on), ops.topk(z, b, strength, 1, **on)
        scored = ops.score(z, b, strength, drawn.token, **on)
        permuted = order[ops.sample(z[:, order], b[:, order], strength, **on).token]
    assert abs(float(delta.sum())) < 1e-4
    torch.testing.assert_close(moved, delta, **near)
    kept = unsteered.isfinite()
    assert torch.equal(unsteered[kept], z[kept])
    assert torch.equal(drawn.token, best.token[:, 0])
    torch.testing.assert_close(drawn.logprob, best.logprob[:, 0], **near)
    torch.testing.assert_close(scored, steered.log_softmax(-1).amax(-1), **near)
    assert float(steered[0, permuted]) >= float(steered.max()) - 1e-4  # but for near ties
