"""The C++ CPU kernels against the reference in float64."""

import pytest
import torch

from svd_engine.kernels import reference
from svd_engine.ops import cpu
from tests import packed

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

INF, NAN = float("inf"), float("nan")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
VOCABS = [1, 7, 100, 256, 4096, 49152, 50257, 151936]


@pytest.fixture(autouse=True)
def one_thread():
    """The references are many small parallel regions, slow where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=cpu.CAPABILITIES[:3])  # the next differs in linear layers alone
def each_capability(request):
    best = cpu.capability()
    if cpu.capability(request.param) != request.param:
        pytest.skip(f"no {request.param} here")
    yield
    cpu.capability(best)


def logits(n, vocab, seed=0, scale=3.0):
    """A base row and an adapted row that moved a little away from it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, vocab, generator=generator) * scale
    return base + torch.randn(n, vocab, generator=generator) * 0.5, base


def steer(adapted, base, strength=3.0, alpha=0.1, penalty=-INF, dtype=None):
    out = torch.full(adapted.shape, NAN, dtype=dtype or adapted.dtype)
    cpu.steer(adapted, base, packed.mask(strength, alpha, penalty), out)
    return out


def sample(
    adapted, base, strength=3.0, alpha=0.1, penalty=-INF, temperature=0.0, seed=0, position=0
):
    token = torch.full(adapted.shape[:1], -7)
    logprob = torch.full(adapted.shape[:1], 7.0)
    by, draw = packed.mask(strength, alpha, penalty), packed.draw(temperature, seed, position)
    cpu.sample(adapted, base, by, draw, token, logprob)
    return token, logprob


def check(adapted, base, strength=3.0, alpha=0.1, penalty=-INF):
    """Both operators: the right tokens, and no further from the truth than float32 PyTorch is."""
    options = {"alpha": alpha, "penalty": penalty}
    truth = reference.steer(adapted.double(), base.double(), strength, **options)
    plain = reference.steer(adapted.float(), base.float(), strength, **options)
    got = steer(adapted, base, strength, dtype=F32, **options)
    assert torch.equal(got.isnan(), truth.isnan())
    assert torch.equal(got == -INF, truth == -INF)
    finite = truth.isfinite()
    scale = torch.as_tensor(strength).abs().max().item() + 1
    if finite.any():
        error = (got - truth)[finite].abs()
        allowed = (plain - truth)[finite].abs().max() + 3e-7 * (scale + truth[finite].abs())
        assert (error <= allowed).all()

    narrow = steer(adapted, base, strength, **options)
    assert torch.equal(narrow.nan_to_num(5.0), got.to(adapted.dtype).nan_to_num(5.0))

    token, logprob = sample(adapted, base, strength, **options)
    want = reference.sample(adapted.double(), base.double(), strength, **options)
    plain = reference.sample(adapted.float(), base.float(), strength, **options)
    assert torch.equal(token, want.token)
    assert torch.equal(logprob.isnan(), want.logprob.isnan())
    allowed = (plain.logprob - want.logprob).abs() + 1e-6 * (scale + want.logprob.abs())
    assert ((logprob - want.logprob).abs() <= allowed)[~want.logprob.isnan()].all()


@pytest.mark.usefixtures("each_capability")
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_vocabularies_and_dtypes(vocab, dtype):
    adapted, base = logits(2 if vocab > 10000 else 5, vocab)
    check(adapted.to(dtype), base.to(dtype))


@pytest.mark.usefixtures("each_capability")
@pytest.mark.parametrize("adapted_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("base_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("out_dtype", [F32, BF16, F16])
def test_mixed_dtypes(adapted_dtype, base_dtype, out_dtype):
    adapted, base = logits(3, 1003)
    adapted, base = adapted.to(adapted_dtype), base.to(base_dtype)
    check(adapted, base)
    for penalty in (-INF, -2.5):
        wide = steer(adapted, base, penalty=penalty, dtype=F32)
        assert torch.equal(
            steer(adapted, base, penalty=penalty, dtype=out_dtype), wide.to(out_dtype)
        )


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
@pytest.mark.parametrize("strength", [-20.0, 0.0, 3.0, torch.tensor([-20.0, 0.0, 3.0, 1e30])])
@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.1, 1.0])
@pytest.mark.parametrize("penalty", [-INF, -1000.0, 0.0])
def test_strength_alpha_penalty(strength, alpha, penalty):
    adapted, base = logits(4, 1000)
    adapted[:, ::7] = -INF
    if isinstance(strength, torch.Tensor):
        assert not steer(adapted, base, strength, alpha, penalty).isnan().any()
        adapted, base, strength = adapted[:3], base[:3], strength[:3]
    check(adapted, base, strength, alpha, penalty)
    assert (steer(adapted, base, strength, alpha, penalty)[:, ::7] == -INF).all()


@pytest.mark.usefixtures("each_capability")
def test_flat_rows():
    adapted = torch.full((2, 5000), 1.25)
    base = logits(2, 5000)[1]
    for alpha in (0.0, 0.1, 1.0):
        check(adapted, base, alpha=alpha)
    check(adapted, adapted)
    assert sample(adapted, adapted)[0].tolist() == [0, 0]


def test_ties_go_to_the_lowest_id():
    adapted = logits(64, 3000)[0].round()
    check(adapted, adapted - 2)
    base = adapted.clone()
    for at in (2999, 256, 255, 0):
        adapted[:, at:] = 50.0
        base[:, at:] = 49.0
        assert (sample(adapted, base, alpha=1.0)[0] == at).all()


@pytest.mark.usefixtures("each_capability")
def test_infinite_logits():
    adapted, base = logits(6, 2000)
    adapted[0, 256:1100] = -INF  # whole blocks
    base[1, 100:900] = -INF
    adapted[2, :1500], base[2, :1500] = -INF, -INF
    adapted[3, 1:] = -INF
    base[4] = -INF
    adapted[5, ::2], base[5, 1::2] = -INF, -INF
    for alpha in (0.0, 0.1):
        for strength in (-20.0, 0.0, 3.0):
            check(adapted, base, strength, alpha)


@pytest.mark.usefixtures("each_capability")
def test_spoiled_rows_are_alone_in_it():
    adapted, base = logits(9, 2000)
    clean = steer(adapted, base), *sample(adapted, base)
    adapted[0, 1999] = NAN
    adapted[1, 3] = INF
    base[2, 700] = NAN
    base[3, 1024] = INF
    adapted[4] = -INF
    base[5, 9], adapted[5, 9] = NAN, -INF
    adapted[6, 0], base[6, 0] = NAN, NAN
    adapted[7, :256] = NAN
    check(adapted, base)
    assert sample(adapted, base)[0].tolist()[:8] == [-1] * 8
    assert steer(adapted, base)[:8].isnan().all()
    for got, want in zip((steer(adapted, base), *sample(adapted, base)), clean, strict=True):
        assert torch.equal(got[8], want[8])
    for options in ({"temperature": 1.0}, {"penalty": -5.0}, {"alpha": 0.0}):
        assert sample(adapted, base, **options)[0].tolist()[:8] == [-1] * 8


@pytest.mark.usefixtures("each_capability")
def test_underflow_and_large_values():
    adapted, base = logits(4, 1000)
    adapted[0] *= 1000
    base[1] *= 1e4
    adapted[2], base[2] = adapted[2] * 1e30, base[2] * 1e-30
    adapted[3] += 4096
    check(adapted[:2], base[:2])
    check(adapted[3:], base[3:])
    token, logprob = sample(adapted, base)
    assert token[2] == adapted[2].argmax() and logprob[2] == 0


@pytest.mark.usefixtures("each_capability")
def test_layouts():
    adapted, base = logits(4, 1003)
    want = steer(adapted, base)
    wide = torch.full((4, 1100), NAN)
    wide[:, 5:1008] = adapted  # padded, and 20 bytes off any alignment
    assert torch.equal(steer(wide[:, 5:1008], base), want)
    check(wide[:, 5:1008], base)
    odd = torch.full((4, 1100), NAN, dtype=BF16)
    odd[:, 3:1006] = adapted
    check(odd[:, 3:1006], base.to(BF16))
    storage = torch.zeros(4 * 4 * 1003 + 1, dtype=torch.uint8)
    unaligned = torch.frombuffer(storage.numpy(), dtype=F32, count=4 * 1003, offset=1)
    unaligned = unaligned.view(4, 1003)
    unaligned.copy_(adapted)
    assert torch.equal(steer(unaligned, base), want)
    one = base[1:2].expand(4, -1)
    assert torch.equal(steer(adapted, one), steer(adapted, one.clone()))
    assert torch.equal(steer(adapted[::2], base[::2]), want[::2])
    assert torch.equal(steer(adapted.flip(0), base.flip(0)).flip(0), want)

    padded = torch.full((4, 1100), 7.0)
    cpu.steer(adapted, base, packed.mask(3.0), padded[:, 5:1008])
    assert torch.equal(padded[:, 5:1008], want)
    assert (padded[:, :5] == 7).all() and (padded[:, 1008:] == 7).all()
    slots = torch.full((4, 2), -9)
    cpu.sample(adapted, base, packed.mask(3.0), packed.draw(), slots[:, 1], torch.empty(4))
    assert (slots[:, 0] == -9).all() and torch.equal(slots[:, 1], want.argmax(-1))


@pytest.mark.parametrize("penalty", [-INF, -3.0])
def test_in_place(penalty):
    adapted, base = logits(3, 70_000)
    want = steer(adapted, base, penalty=penalty)
    for out in (adapted.clone(), base.clone()):
        rows = (out, base) if torch.equal(out, adapted) else (adapted, out)
        cpu.steer(*rows, packed.mask(3.0, 0.1, penalty), out)
        assert torch.equal(out, want)


def test_rows_too_large_for_the_cache():
    """The kernel then writes past it, where rows are aligned: these take turns."""
    adapted, base = logits(24, 100_003)
    want = torch.cat([steer(adapted[i : i + 1], base[i : i + 1]) for i in range(24)])
    assert torch.equal(steer(adapted, base), want)


def test_no_rows():
    empty = torch.empty(0, 100)
    assert steer(empty, empty).shape == (0, 100)
    assert sample(empty, empty)[0].shape == (0,)


def test_offsets_are_64_bit():
    """Rows 2**31 + 64 elements apart; of 4 GB of addresses, only the pages of two rows are used."""
    stride, vocab = 2**31 + 64, 1000
    try:
        storage = torch.empty(stride + vocab, dtype=BF16)
    except RuntimeError as error:
        pytest.skip(str(error))
    far = storage.as_strided((2, vocab), (stride, 1))
    adapted, base = (x.to(BF16) for x in logits(2, vocab))
    far.copy_(adapted)
    want = steer(adapted, base)
    assert torch.equal(steer(far, base), want)
    assert torch.equal(sample(far, base)[0], sample(adapted, base)[0])
    cpu.steer(far, base, packed.mask(3.0), far)
    assert torch.equal(far, want)


@pytest.mark.usefixtures("each_capability")
@pytest.mark.parametrize("alpha", [0.0, 0.1])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_noise_is_that_of_the_reference(alpha, temperature):
    adapted, base = logits(48, 5003)
    seed = torch.arange(48) * 0x9E3779B97F4A7C15 % 2**63 - 2**62
    position = torch.arange(48) * 2**29
    options = {"alpha": alpha, "temperature": temperature, "seed": seed, "position": position}
    want = reference.sample(adapted.double(), base.double(), 3.0, **options)
    token, logprob = sample(adapted, base, **options)
    assert torch.equal(token, want.token)
    torch.testing.assert_close(logprob.double(), want.logprob, rtol=1e-6, atol=1e-5)
    alone = sample(adapted[5:6], base[5:6], **options | {
        "seed": seed[5].item(), "position": position[5].item()
    })  # fmt: skip
    assert torch.equal(alone[0], token[5:6]) and torch.equal(alone[1], logprob[5:6])


def test_sampled_frequencies_follow_the_distribution():
    adapted, base = logits(1, 40, scale=1.0)
    draws = 20_000
    token, _ = sample(
        adapted.expand(draws, -1), base.expand(draws, -1), alpha=0.0, temperature=1.0,
        seed=5, position=torch.arange(draws),
    )  # fmt: skip
    p = reference.steer(adapted.double(), base.double(), 3.0, alpha=0.0).softmax(-1)[0]
    chi2 = ((token.bincount(minlength=40) - draws * p).square() / (draws * p)).sum()
    assert chi2 < 39 + 4 * 78**0.5


@pytest.mark.parametrize("options", [{}, {"alpha": 0.0}, {"penalty": -4.0}])
def test_the_same_bits_on_any_number_of_threads_and_in_any_batch(options):
    adapted, base = logits(3, 151936)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        rows = [(adapted, base)] + [(adapted[i : i + 1], base[i : i + 1]) for i in range(3)]
        whole, *single = [
            (steer(*row, **options), *sample(*row, **options), *sample(*row, temperature=1.0))
            for row in rows
        ]
        results.append(whole)
        for i, parts in enumerate(single):
            assert all(torch.equal(a[0], b[i]) for a, b in zip(parts, whole, strict=True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_wrong_arguments_raise():
    adapted, base = logits(2, 10)
    for rows in ((adapted[0], base[0]), (adapted, base[:, :9]), (adapted.double(), base.double())):
        with pytest.raises(RuntimeError):
            cpu.steer(*rows, packed.mask(1.0), torch.empty(2, 10))
    with pytest.raises(RuntimeError):
        cpu.steer(adapted.t(), base.t(), packed.mask(1.0), torch.empty(10, 2))
    with pytest.raises(RuntimeError):
        cpu.steer(adapted, base, packed.mask(torch.ones(3)), torch.empty(2, 10))


def test_says_why_it_is_unavailable(monkeypatch, tmp_path):
    def reload():
        cpu._load.cache_clear()
        cpu._ops.cache_clear()
        return cpu.unavailable()

    with monkeypatch.context() as patch:
        patch.setattr(cpu, "__file__", str(tmp_path / "ops" / "cpu.py"))
        assert "not built" in reload()
        (tmp_path / "_native.abi3.so").write_bytes(b"no library")
        assert "_native.abi3.so failed to load" in reload()
        with pytest.raises(RuntimeError, match="failed to load"):
            cpu.capability()
    assert reload() is None
