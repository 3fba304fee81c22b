"""The C++ CPU kernels where they are not as other backends: layouts, threads, memory, dtypes."""

import itertools

import pytest
import torch

from svd_engine import ops
from svd_engine.kernels import reference
from svd_engine.ops import cpu, dispatch

from . import packed
from .cases import BF16, F16, F32, INF, NAN, OPERATORS, logits, options
from .oracle import same
from .runners import available

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

MASKS = [{}, {"alpha": 0.0}, {"penalty": -4.0}]


@pytest.fixture(autouse=True)
def one_thread():
    """The references are many small parallel regions, slow where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=cpu.CAPABILITIES[:3])  # the next differs in linear layers only
def each_capability(request):
    best = cpu.capability()
    if request.param not in available():
        pytest.skip(f"no {request.param} here")
    cpu.capability(request.param)
    yield
    cpu.capability(best)


def every(z, b, rows=slice(None), **given):
    """The results of all operators, on some of the rows."""
    o = options(z, **given)
    if rows != slice(None):
        o = o.row(rows.start)
    runs = (run(z[rows], b[rows], o, "cpu", None) for run, *_ in OPERATORS.values())
    return list(itertools.chain(*runs))


def assert_same(got, want):
    assert all(same(x, y) for x, y in zip(got, want, strict=True))


def steer(z, b, strength=3.0, alpha=0.1, penalty=-INF, dtype=None):
    out = torch.full(z.shape, NAN, dtype=dtype or z.dtype)
    cpu.steer(z, b, packed.mask(strength, alpha, penalty), out)
    return out


def drawn(z, b, alpha, penalty, *draw):
    token, logprob = torch.full(z.shape[:1], -7), torch.full(z.shape[:1], 7.0)
    mask = packed.mask(3.0, alpha, penalty)
    cpu.sample(z, b, mask, packed.draw(*draw), token, logprob)
    return token, logprob


@pytest.mark.usefixtures("each_capability")
def test_every_half_is_read_and_written_as_pytorch_does():
    """alpha = 0 and strength 0 give the adapted logits back, rounded to `out`."""
    for dtype in (BF16, F16):
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        every = every[every.abs() < 1e37][None]  # whose differences do not overflow
        zero = torch.zeros_like(every)
        for out in (F32, BF16, F16):
            assert torch.equal(steer(every, zero, 0.0, alpha=0.0, dtype=out), every.to(out))
    wide = torch.randn(1, 200_000) * 10 ** torch.linspace(-9, 5.5, 200_000)
    for out in (BF16, F16):
        got = steer(wide, torch.zeros_like(wide), 0.0, alpha=0.0, dtype=out)
        assert torch.equal(got, wide.to(out))


@pytest.mark.usefixtures("each_capability")
@pytest.mark.parametrize("vocab", [100, 256, 4096])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_topk_of_the_whole_vocabulary_is_in_the_order_of_the_steered_logits(dtype, vocab):
    for base, given in itertools.product(
        (dtype, F32), ((0.1, -INF), (0.0, -2.0), (0.3, -0.5), (1.0, 0.0))
    ):
        z, b = logits(3, vocab, "cpu", dtype, base)
        z[0, ::7], b[1, ::5] = -INF, -INF
        logprob, token = torch.full(z.shape, 7.0), torch.full(z.shape, -7)
        cpu.topk(z, b, packed.mask(3.0, *given), vocab, logprob, token)
        steered = steer(z, b, 3.0, *given, dtype=F32)
        assert torch.equal(token, steered.sort(dim=-1, descending=True, stable=True).indices)
        wanted = steered.double().log_softmax(-1).gather(-1, token)
        torch.testing.assert_close(logprob.double(), wanted, rtol=1e-6, atol=2e-5)


@pytest.mark.usefixtures("each_capability")
@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.1, 1.0])
@pytest.mark.parametrize("penalty", [-INF, -1000.0, 0.0])
def test_strengths_without_measure_are_no_nan(penalty, alpha):
    z, b = logits(4, 1000, "cpu")
    z[:, ::7] = -INF
    got = steer(z, b, torch.tensor([-20.0, 0.0, 3.0, 1e30]), alpha, penalty)
    assert not got.isnan().any() and (got[:, ::7] == -INF).all()


@pytest.mark.usefixtures("each_capability")
def test_ties_go_to_the_lowest_id():
    z = logits(64, 3000, "cpu")[0].round()
    want = reference.sample(z.double(), z.double() - 2, 3.0)
    b = z.clone()
    assert torch.equal(drawn(z, z - 2, 0.1, -INF, 0.0, 0, 0)[0], want.token)
    for at in (2999, 256, 255, 0):
        z[:, at:] = 50.0
        b[:, at:] = 49.0
        assert (drawn(z, b, 1.0, -INF, 0.0, 0, 0)[0] == at).all()


@pytest.mark.usefixtures("each_capability")
def test_layouts():
    z, b = logits(4, 1003, "cpu")
    want = every(z, b)
    wide = torch.full((4, 1100), NAN)
    wide[:, 5:1008] = z  # padded, and 20 bytes off any alignment
    assert_same(every(wide[:, 5:1008], b), want)
    storage = torch.zeros(4 * 4 * 1003 + 1, dtype=torch.uint8)
    unaligned = torch.frombuffer(storage.numpy(), dtype=F32, count=4 * 1003, offset=1)
    unaligned = unaligned.view(4, 1003)
    unaligned.copy_(z)
    assert_same(every(unaligned, b), want)
    one = b[1:2].expand(4, -1)
    assert_same(every(z, one), every(z, one.clone()))
    half = torch.full((4, 1100), NAN, dtype=BF16)
    half[:, 3:1006] = z
    exact = z.to(BF16)
    # But for `steer`, whose output has the dtype of z.
    wide, narrow = every(exact.float(), b), every(half[:, 3:1006], b)
    same_dtype = [(x, y) for x, y in zip(narrow, wide, strict=True) if x.dtype == y.dtype]
    assert len(wide) - len(same_dtype) == 2
    assert all(same(*pair) for pair in same_dtype)
    assert_same(every(b, half[:, 3:1006]), every(b, exact.float()))
    flipped = steer(z.flip(0), b.flip(0)).flip(0)
    assert torch.equal(flipped, steer(z, b))


@pytest.mark.usefixtures("each_capability")
def test_outputs_may_be_strided():
    z, b = logits(4, 1003, "cpu")
    want = steer(z, b)
    padded = torch.full((4, 1100), 7.0)
    cpu.steer(z, b, packed.mask(3.0), padded[:, 5:1008])
    assert torch.equal(padded[:, 5:1008], want)
    assert (padded[:, :5] == 7).all() and (padded[:, 1008:] == 7).all()
    slots = torch.full((4, 2), -9)
    cpu.sample(z, b, packed.mask(3.0), packed.draw(), slots[:, 1], torch.empty(4))
    assert (slots[:, 0] == -9).all() and torch.equal(slots[:, 1], want.argmax(-1))
    logprob, token = torch.full((4, 30), 7.0), torch.full((4, 30), -7)
    cpu.topk(z, b, packed.mask(3.0), 5, logprob[:, 3:28:5], token[:, 1:6])
    best = torch.full((4, 5), 7.0), torch.full((4, 5), -7)
    cpu.topk(z, b, packed.mask(3.0), 5, *best)
    assert torch.equal(logprob[:, 3:28:5], best[0]) and torch.equal(token[:, 1:6], best[1])
    assert (logprob == 7).sum() == 4 * 25 and (token == -7).sum() == 4 * 25
    columns, alone = torch.full((4, 3), 7.0), torch.empty(4)
    cpu.divergence(z, b, columns[:, 1])
    cpu.divergence(z, b, alone)
    assert torch.equal(columns[:, 1], alone) and (columns[:, ::2] == 7).all()
    for dtype in (BF16, F16):
        narrow, vector = torch.empty(4, 1003, dtype=dtype), torch.empty(4, 1003)
        cpu.steering_vector(z, b, "projected", narrow)
        cpu.steering_vector(z, b, "projected", vector)
        assert torch.equal(narrow, vector.to(dtype))


@pytest.mark.parametrize("penalty", [-INF, -3.0])
def test_in_place(penalty):
    z, b = logits(3, 70_000, "cpu")
    want, delta = steer(z, b, penalty=penalty), torch.empty_like(z)
    cpu.steering_vector(z, b, "projected", delta)
    for at in (0, 1):
        rows = [z.clone(), b.clone()]
        cpu.steer(*rows, packed.mask(3.0, 0.1, penalty), rows[at])
        assert torch.equal(rows[at], want)
        rows = [z.clone(), b.clone()]
        cpu.steering_vector(*rows, "projected", rows[at])
        assert torch.equal(rows[at], delta)


def test_rows_too_large_for_the_cache():
    """The kernel then writes past it, where rows are aligned: these take turns."""
    z, b = logits(24, 100_003, "cpu")
    want = torch.cat([steer(z[i : i + 1], b[i : i + 1]) for i in range(24)])
    assert torch.equal(steer(z, b), want)


def test_offsets_are_64_bit():
    """Rows 2**31 + 64 elements apart; of 4 GB of addresses, only the pages of two rows are used."""
    stride, vocab = 2**31 + 64, 1000
    try:
        storage = torch.empty(stride + vocab, dtype=BF16)
    except RuntimeError as error:
        pytest.skip(str(error))
    far = storage.as_strided((2, vocab), (stride, 1))
    z, b = logits(2, vocab, "cpu", BF16)
    far.copy_(z)
    assert_same(every(far, b), every(z, b))
    want = steer(z, b)
    cpu.steer(far, b, packed.mask(3.0), far)
    assert torch.equal(far, want)


@pytest.mark.usefixtures("each_capability")
@pytest.mark.parametrize("alpha", [0.0, 0.1])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_noise_is_that_of_the_reference(alpha, temperature):
    z, b = logits(48, 5003, "cpu")
    seed = torch.arange(48) * 0x9E3779B97F4A7C15 % 2**63 - 2**62
    position = torch.arange(48) * 2**29
    draw = {"alpha": alpha, "temperature": temperature, "seed": seed, "position": position}
    want = reference.sample(z.double(), b.double(), 3.0, **draw)
    token, logprob = drawn(z, b, alpha, -INF, temperature, seed, position)
    assert torch.equal(token, want.token)
    torch.testing.assert_close(logprob.double(), want.logprob, rtol=1e-6, atol=1e-5)
    one = alpha, -INF, temperature, seed[5].item(), position[5].item()
    alone = drawn(z[5:6], b[5:6], *one)
    assert torch.equal(alone[0], token[5:6]) and torch.equal(alone[1], logprob[5:6])


def test_sampled_frequencies_follow_the_distribution():
    z, b = (x.expand(20_000, -1) for x in logits(1, 40, "cpu", spread=1.0))
    token, _ = drawn(z, b, 0.0, -INF, 1.0, 5, torch.arange(20_000))
    p = reference.steer(z[:1].double(), b[:1].double(), 3.0, alpha=0.0).softmax(-1)[0]
    chi2 = ((token.bincount(minlength=40) - 20_000 * p).square() / (20_000 * p)).sum()
    assert chi2 < 39 + 4 * 78**0.5


CUTS = [(1, 1.0, 0.0), (7, 1.0, 0.0), (0, 0.0, 0.0), (0, 0.6, 0.0), (0, 0.97, 0.0), (0, 1.0, 0.2),
        (0, 1.0, 1.0), (20, 0.9, 0.02), (999, 1.0, 1e-9)]  # fmt: skip


@pytest.mark.usefixtures("each_capability")
@pytest.mark.parametrize("penalty", [-INF, -0.2])
@pytest.mark.parametrize("alpha", [0.0, 0.1])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.5])
def test_cuts_keep_the_tokens_that_the_reference_keeps(penalty, alpha, cut, temperature):
    """The kept tokens show in what is drawn over many positions."""
    z, b = (x.expand(300, -1) for x in logits(1, 300, "cpu", spread=1.5))
    position = torch.arange(300)
    want = reference.sample(
        z.double(), b.double(), 3.0, alpha=alpha, penalty=penalty, temperature=temperature,
        seed=11, position=position, **dict(zip(("top_k", "top_p", "min_p"), cut, strict=True)),
    )  # fmt: skip
    token, logprob = drawn(z, b, alpha, penalty, temperature, 11, position, *cut)
    assert torch.equal(token, want.token)
    torch.testing.assert_close(logprob.double(), want.logprob, rtol=1e-6, atol=1e-5)


@pytest.mark.usefixtures("each_capability")
def test_ties_are_cut_to_the_lowest_ids():
    z = torch.zeros(400, 1000)  # of which the mask leaves 334
    z[:, ::3] = 5.0
    position = torch.arange(400)
    for cut in ((3, 1.0, 0.0), (0, 2.5 / 334, 0.0)):
        token, _ = drawn(z, z, 0.1, -INF, 1.0, 0, position, *cut)
        assert set(token.tolist()) == {0, 3, 6}
    kept, _ = drawn(z, z, 0.0, -INF, 1.0, 0, position, 0, 1.0, 1.0)
    assert (kept % 3 == 0).all() and len(kept.unique()) > 100


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("given", [(0.1, -INF), (0.0, -INF), (0.1, -1.0)])
def test_cuts_that_cut_nothing_change_nothing(given, temperature):
    z, b = logits(20, 4000, "cpu")
    draw = 5, torch.arange(20)
    plain = drawn(z, b, *given, temperature, *draw)
    for cut in ((0, 1.0, 0.0), (4000, 1.0, 0.0), (0, 1 - 1e-12, 0.0), (0, 1.0, 1e-30)):
        got = drawn(z, b, *given, temperature, *draw, *cut)
        assert torch.equal(got[0], plain[0])
        torch.testing.assert_close(got[1], plain[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("given", MASKS)
def test_the_same_bits_on_any_number_of_threads_and_in_any_batch(given):
    z, b = logits(3, 151936, "cpu")
    whole = every(z, b, **given)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert_same(every(z, b, **given), whole)
        for i in range(3):
            alone = every(z, b, slice(i, i + 1), **given)
            assert_same(alone, [x[i : i + 1] for x in whole])


def test_wrong_arguments_raise():
    z, b = logits(2, 10, "cpu")

    def listed(**wrong):
        fields = reference.Support(*dispatch.OPERATORS["support"].outputs(z, 1))
        cpu.support(z, b, target, 0.1, "projected", 1, *fields._replace(**wrong))

    out, target = torch.empty(2, 10), torch.zeros(2, dtype=torch.int64)
    short, one = torch.empty(1), torch.empty(2, 1)
    mask = packed.mask(1.0)
    for rows in ((z[0], b[0]), (z, b[:, :9]), (z.double(), b.double())):
        with pytest.raises(RuntimeError):
            cpu.steer(*rows, mask, out)
    for wrong in (target[:1], target - 1, target + 10, target.int()):
        with pytest.raises(RuntimeError):
            cpu.score(z, b, mask, wrong, torch.empty(2))
        with pytest.raises(RuntimeError):
            cpu.project_strength(z, b, wrong, 0.1, "projected", *torch.empty(3, 2), target > 0)
    for call in (
        lambda: cpu.steer(z.t(), b.t(), mask, torch.empty(10, 2)),
        lambda: cpu.steer(z, b, packed.mask(torch.ones(3)), out),
        lambda: cpu.topk(z, b, mask, 0, torch.empty(2, 0), target[:, None]),
        lambda: cpu.topk(z, b, mask, 1, torch.empty(2, 2), target[:, None]),
        lambda: cpu.topk(z, b, mask, 1, one, torch.empty(2, 1)),
        lambda: cpu.divergence(z, b, short),
        lambda: cpu.divergence(z, b[:, :9], torch.empty(2)),
        lambda: cpu.steering_vector(z, b, "projected", torch.empty(2, 9)),
        lambda: cpu.score(z, b, mask, target, short),
        lambda: listed(token=target[:, None].int()),
        lambda: listed(p=torch.empty(2, 3)),
        lambda: listed(size=torch.empty(2)),
    ):
        with pytest.raises(RuntimeError):
            call()


def test_says_why_it_is_unavailable(monkeypatch, tmp_path):
    def reload():
        cpu._load.cache_clear()
        cpu._ops.cache_clear()
        return cpu.unavailable()

    with monkeypatch.context() as patch:
        patch.setattr(cpu, "__file__", str(tmp_path / "ops" / "cpu.py"))
        assert "not built" in reload()
        (tmp_path / "_cpu.abi3.so").write_bytes(b"no library")
        assert "_cpu.abi3.so failed to load" in reload()
        with pytest.raises(RuntimeError, match="failed to load"):
            cpu.capability()
    assert reload() is None


def test_a_fallback_is_told_once(monkeypatch, caplog):
    def forget():
        for remembers in (dispatch.unavailable, dispatch.choose, dispatch._tell):
            remembers.cache_clear()

    rows = torch.randn(2, 3, 50)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "unavailable", lambda: "was not built")
            forget()
            for _ in range(2):
                ops.steer(*rows, -1.0)
                ops.divergence(*rows)
    finally:
        forget()
    (line,) = caplog.messages
    assert "No native kernels for cpu, so decoding is slower (cpu: was not built)." in line
