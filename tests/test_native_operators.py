"""The C++ CPU kernels against the reference in float64: all but `steer` and `sample`."""

import pytest
import torch

from svd_engine.kernels import reference
from svd_engine.ops import cpu
from tests import packed, test_native
from tests.test_native import BF16, F16, F32, INF, NAN, VOCABS, logits, steer

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

one_thread, each_capability = test_native.one_thread, test_native.each_capability  # fixtures

EPS = 3e-7
NO_CUT = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def poisoned(*shape, dtype=F32):
    return torch.full(shape, {torch.int64: -7, torch.bool: True}.get(dtype, 7.0), dtype=dtype)


def steering_vector(adapted, base, dtype=F32):
    out = poisoned(*adapted.shape, dtype=dtype)
    cpu.steering_vector(adapted, base, out)
    return out


def topk(adapted, base, strength=3.0, k=5, alpha=0.1, penalty=-INF):
    shape = len(adapted), min(k, adapted.shape[1])
    out = poisoned(*shape), poisoned(*shape, dtype=torch.int64)
    cpu.topk(adapted, base, packed.mask(strength, alpha, penalty), shape[1], *out)
    return out


def score(adapted, base, target, strength=3.0, alpha=0.1, penalty=-INF):
    out = poisoned(len(adapted))
    cpu.score(adapted, base, packed.mask(strength, alpha, penalty), target, out)
    return out


def project_strength(adapted, base, target, alpha=0.1):
    out = *(poisoned(len(adapted)) for _ in range(3)), poisoned(len(adapted), dtype=torch.bool)
    cpu.project_strength(adapted, base, target, alpha, *out)
    return out


def divergence(adapted, base):
    out = poisoned(len(adapted))
    cpu.divergence(adapted, base, out)
    return out


def sample_cut(
    adapted, base, strength=3.0, alpha=0.1, penalty=-INF, temperature=1.0, top_k=0, top_p=1.0,
    min_p=0.0, seed=0, position=0,
):  # fmt: skip
    token, logprob = poisoned(len(adapted), dtype=torch.int64), poisoned(len(adapted))
    draw = packed.draw(temperature, seed, position, top_k, top_p, min_p)
    cpu.sample(adapted, base, packed.mask(strength, alpha, penalty), draw, token, logprob)
    return token, logprob


def assert_earned(got, truth, plain, slack):
    """The same NaN and infinities, and finite values as close as float32 PyTorch's, or `slack`."""
    assert torch.equal(got.isnan(), truth.isnan())
    assert torch.equal(got == INF, truth == INF) and torch.equal(got == -INF, truth == -INF)
    finite = truth.isfinite()
    plain = (plain - truth).abs().nan_to_num(0.0, 0.0, 0.0)
    slack = torch.as_tensor(slack).expand_as(truth)
    assert ((got - truth).abs() <= plain + slack)[finite].all()


def reach(adapted, base):
    """The greatest |adapted - base| of a row: the mean of them has a float32's share as error."""
    difference = (adapted.double() - base.double()).abs().nan_to_num(0.0, 0.0, 0.0)
    return difference.amax(-1, keepdim=True)


def check_unmasked(adapted, base):
    truth = reference.steering_vector(adapted.double(), base.double())
    plain = reference.steering_vector(adapted.float(), base.float())
    vector = steering_vector(adapted, base)
    share = adapted.double().softmax(-1).nan_to_num(0.0)  # of the error of the mean
    slack = EPS * (4 * share * reach(adapted, base) + 3 * truth.abs()) + 1e-36  # or underflow
    assert_earned(vector, truth, plain, slack)
    narrow = steering_vector(adapted, base, BF16)
    assert torch.equal(narrow.nan_to_num(5.0), vector.to(BF16).nan_to_num(5.0))

    truth = reference.divergence(adapted.double(), base.double())
    plain = reference.divergence(adapted.float(), base.float())
    assert_earned(divergence(adapted, base), truth, plain, EPS * (3 + truth.abs()))


def check(adapted, base, strength=3.0, alpha=0.1, penalty=-INF, ks=(1, 5, 300)):
    n, vocab = adapted.shape
    wide, narrow = (adapted.double(), base.double()), (adapted.float(), base.float())
    options = {"alpha": alpha, "penalty": penalty}
    scale = torch.as_tensor(strength).abs().reshape(-1, 1) + 1

    # In exactly the order of the steered logits in float32, tokens at -inf among them.
    logit = steer(adapted, base, strength, dtype=F32, **options)
    valid = ~logit.isnan().any(-1, keepdim=True)
    order = torch.sort(logit, dim=-1, descending=True, stable=True).indices
    order = order.masked_fill(~valid, -1)
    truth = reference.steer(*wide, strength, **options).log_softmax(-1)
    plain = reference.steer(*narrow, strength, **options).log_softmax(-1)
    mean_error = 4 * EPS * reach(adapted, base)
    slack = 1e-6 * (scale + truth.abs()) + scale * mean_error
    for k in ks:
        logprob, token = topk(adapted, base, strength, k, **options)
        assert torch.equal(token, order[:, :k])
        at = token.clamp(min=0)
        assert_earned(logprob, *(x.gather(1, at) for x in (truth, plain, slack)))

    generator = torch.Generator().manual_seed(3)
    anywhere = torch.randint(vocab, (n,), generator=generator)
    for target in (anywhere, adapted.nan_to_num().argmax(-1), base.nan_to_num().argmin(-1)):
        got = score(adapted, base, target, strength, **options)[:, None]
        at = target[:, None]
        assert_earned(got, *(x.gather(1, at) for x in (truth, plain, slack)))

        got = project_strength(adapted, base, target, alpha)
        want = reference.project_strength(*wide, target, alpha=alpha)
        plain_projection = reference.project_strength(*narrow, target, alpha=alpha)
        assert torch.equal(got[3], want.in_support)
        error = mean_error[:, 0]
        assert_earned(got[0], want[0], plain_projection[0], error + EPS * want[0].abs())
        for i in (1, 2):
            slack_i = error * (error + 2 * want[i].sqrt()) + 4 * EPS * want[i]
            assert_earned(got[i], want[i], plain_projection[i], slack_i)


@pytest.mark.usefixtures("each_capability")
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_vocabularies_and_dtypes(vocab, dtype):
    adapted, base = logits(2 if vocab > 10000 else 5, vocab)
    check_unmasked(adapted.to(dtype), base.to(dtype))
    check(adapted.to(dtype), base.to(dtype))
    if vocab < 10000 or dtype == F32:
        check(adapted.to(dtype), base, alpha=0.0, penalty=-2.0, ks=(vocab,))


@pytest.mark.usefixtures("each_capability")
@pytest.mark.parametrize("strength", [-20.0, 0.0, torch.tensor([-20.0, 0.0, 3.0])])
@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.1, 1.0])
@pytest.mark.parametrize("penalty", [-INF, -1000.0, -0.5, 0.0])
def test_strength_alpha_penalty(strength, alpha, penalty):
    adapted, base = logits(3, 1000)
    adapted[:, ::7] = -INF
    check(adapted, base, strength, alpha, penalty, ks=(1, 3, 1000))


@pytest.mark.usefixtures("each_capability")
def test_flat_rows_and_ties():
    flat = torch.full((2, 5000), 1.25)
    for adapted, base in (
        (flat, logits(2, 5000)[1]),
        (flat, flat),
        (logits(2, 5000)[0].round(),) * 2,
    ):
        check_unmasked(adapted, base)
        for options in ({}, {"alpha": 0.0}, {"alpha": 1.0}, {"alpha": 1.0, "penalty": 0.0}):
            check(adapted, base, ks=(1, 7, 2000, 5000), **options)
    assert topk(flat, flat)[1].tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.usefixtures("each_capability")
def test_infinite_logits():
    adapted, base = logits(7, 2000)
    adapted[0, 256:1100] = -INF  # whole blocks
    base[1, 100:900] = -INF
    adapted[2, :1500], base[2, :1500] = -INF, -INF
    adapted[3, 1:] = -INF
    base[4] = -INF
    adapted[5, ::2], base[5, 1::2] = -INF, -INF
    adapted[6, 10], base[6, 10] = -500.0, -INF  # p underflows, and the divergence is infinite
    check_unmasked(adapted, base)
    assert divergence(adapted, base).isinf().tolist() == [False, True, False, False] + [True] * 3
    for alpha in (0.0, 0.1):
        for strength in (-20.0, 0.0, 3.0):
            check(adapted, base, strength, alpha, ks=(1, 1000, 2000))
        check(adapted, base, alpha=alpha, penalty=-1.0, ks=(2000,))


@pytest.mark.usefixtures("each_capability")
def test_spoiled_rows_are_alone_in_it():
    adapted, base = logits(9, 2000)
    adapted[0, 1999] = NAN
    adapted[1, 3] = INF
    base[2, 700] = NAN
    base[3, 1024] = INF
    adapted[4] = -INF
    base[5, 9], adapted[5, 9] = NAN, -INF
    adapted[6, 0], base[6, 0] = NAN, NAN
    adapted[7, :256] = NAN
    check_unmasked(adapted, base)
    for options in ({}, {"alpha": 0.0}, {"penalty": -5.0}):
        check(adapted, base, ks=(1, 2000), **options)
        for cut in ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}):
            token, logprob = sample_cut(adapted, base, **options, **cut)
            alone = sample_cut(adapted[8:], base[8:], **options, **cut)
            assert token.tolist() == [-1] * 8 + alone[0].tolist() and alone[0].item() >= 0
            assert logprob[:8].isnan().all() and logprob[8] == alone[1][0]


@pytest.mark.usefixtures("each_capability")
def test_shifted_near_and_large_rows():
    adapted, base = logits(4, 3000)
    for rows in (
        (adapted + 4096, base), (adapted, base - 64), (adapted, adapted + 1e-3 * base),
        (adapted, adapted), (10 * adapted, 10 * base), (1000 * adapted, base),
        (adapted, 1e4 * base),
    ):  # fmt: skip
        check_unmasked(*rows)
        check(*rows)
    assert (divergence(adapted, adapted) == 0).all()
    # Nothing crashes, and ids stay in range, where the steered logits are no numbers.
    adapted, base = adapted * 1e38, base * -1e38
    for strength in (1e38, -1e38):
        token = topk(adapted, base, strength, 3000, alpha=0.0)[1]
        assert (token >= -1).all() and (token < 3000).all()
        token = sample_cut(adapted, base, strength, alpha=0.0, top_k=5, top_p=0.5)[0]
        assert (token >= -1).all() and (token < 3000).all()


def every(adapted, base):
    """The results of all operators."""
    target = adapted.argmax(-1)
    return (
        steering_vector(adapted, base), divergence(adapted, base),
        *topk(adapted, base), *topk(adapted, base, alpha=0.0), *topk(adapted, base, penalty=-1.0),
        *(score(adapted, base, target, alpha=a, penalty=p) for a, p in ((0.1, -INF), (0.3, -1.0))),
        *project_strength(adapted, base, target), *project_strength(adapted, base, target, 0.0),
        *sample_cut(adapted, base, alpha=0.0, top_k=50, top_p=0.9, min_p=0.01),
        *sample_cut(adapted, base, penalty=-0.1, top_p=0.7),
    )  # fmt: skip


def assert_same(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.usefixtures("each_capability")
def test_layouts():
    adapted, base = logits(4, 1003)
    want = every(adapted, base)
    wide = torch.full((4, 1100), NAN)
    wide[:, 5:1008] = adapted  # padded, and 20 bytes off any alignment
    assert_same(every(wide[:, 5:1008], base), want)
    one = base[1:2].expand(4, -1)
    assert_same(every(adapted, one), every(adapted, one.clone()))
    assert_same(every(adapted[::2], base[::2]), [x[::2] for x in want])
    half = torch.full((4, 1100), NAN, dtype=BF16)
    half[:, 3:1006] = adapted
    exact = adapted.to(BF16)
    assert_same(every(half[:, 3:1006], base), every(exact.float(), base))
    assert_same(every(base, half[:, 3:1006]), every(base, exact.float()))

    logprob, token = poisoned(4, 30), poisoned(4, 30, dtype=torch.int64)
    cpu.topk(adapted, base, packed.mask(3.0), 5, logprob[:, 3:28:5], token[:, 1:6])
    assert torch.equal(logprob[:, 3:28:5], want[2]) and torch.equal(token[:, 1:6], want[3])
    assert (logprob == 7).sum() == 4 * 25 and (token == -7).sum() == 4 * 25
    columns = poisoned(4, 3)
    cpu.divergence(adapted, base, columns[:, 1])
    assert torch.equal(columns[:, 1], want[1]) and (columns[:, ::2] == 7).all()
    out = adapted.clone()
    cpu.steering_vector(out, base, out)
    assert torch.equal(out, want[0])


@pytest.mark.usefixtures("each_capability")
def test_no_rows():
    empty, target = torch.empty(0, 100), torch.empty(0, dtype=torch.int64)
    assert steering_vector(empty, empty).shape == (0, 100) and topk(empty, empty)[0].shape == (0, 5)
    assert divergence(empty, empty).shape == score(empty, empty, target).shape == (0,)
    assert project_strength(empty, empty, target)[0].shape == sample_cut(empty, empty)[0].shape


def test_the_same_bits_on_any_number_of_threads_and_in_any_batch():
    adapted, base = logits(3, 151936)
    whole = every(adapted, base)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert_same(every(adapted, base), whole)
        for i in range(3):
            alone = every(adapted[i : i + 1], base[i : i + 1])
            assert_same(alone, [x[i : i + 1] for x in whole])


@pytest.mark.usefixtures("each_capability")
@pytest.mark.parametrize("penalty", [-INF, -0.2])
@pytest.mark.parametrize("alpha", [0.0, 0.1])
@pytest.mark.parametrize(
    "cut",
    [
        {"top_k": 1}, {"top_k": 7}, {"top_p": 0.0}, {"top_p": 0.6}, {"top_p": 0.97}, {"min_p": 0.2},
        {"min_p": 1.0}, {"top_k": 20, "top_p": 0.9, "min_p": 0.02}, {"top_k": 999, "min_p": 1e-9},
    ],
)  # fmt: skip
@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.5])
def test_cuts_keep_the_tokens_that_the_reference_keeps(penalty, alpha, cut, temperature):
    """The kept tokens show in what is drawn over many positions."""
    adapted, base = logits(1, 300, seed=4, scale=1.5)
    rows = adapted.expand(300, -1), base.expand(300, -1)
    options = {
        "alpha": alpha, "penalty": penalty, "temperature": temperature, "seed": 11,
        "position": torch.arange(300), **cut,
    }  # fmt: skip
    want = reference.sample(rows[0].double(), rows[1].double(), 3.0, **options)
    token, logprob = sample_cut(*rows, **options)
    assert torch.equal(token, want.token)
    torch.testing.assert_close(logprob.double(), want.logprob, rtol=1e-6, atol=1e-5)


@pytest.mark.usefixtures("each_capability")
@pytest.mark.parametrize(
    "cut", [{"top_p": 0.95}, {"top_k": 2000}, {"top_p": 0.999, "top_k": 9000}, {"min_p": 1e-4}]
)
def test_cuts_that_keep_many_tokens(cut):
    adapted, base = logits(4, 50257, scale=1.0)
    adapted[3] = 1.0
    options = {"alpha": 0.0, "temperature": 1.3, "position": torch.arange(4), **cut}
    want = reference.sample(adapted.double(), base.double(), 3.0, **options)
    token, logprob = sample_cut(adapted, base, **options)
    assert torch.equal(token, want.token)
    torch.testing.assert_close(logprob.double(), want.logprob, rtol=1e-6, atol=1e-5)


def test_ties_are_cut_to_the_lowest_ids():
    adapted = torch.zeros(400, 1000)  # of which the mask leaves 334
    adapted[:, ::3] = 5.0
    position = torch.arange(400)
    for cut, kept in (({"top_k": 3}, {0, 3, 6}), ({"top_p": 2.5 / 334}, {0, 3, 6})):
        token, _ = sample_cut(adapted, adapted, position=position, **cut)
        assert set(token.tolist()) == kept
    kept = sample_cut(adapted, adapted, alpha=0.0, position=position, min_p=1.0)[0]
    assert (kept % 3 == 0).all() and len(kept.unique()) > 100


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_no_cut_is_sample_and_the_logprob_is_the_score(temperature):
    adapted, base = logits(20, 4000)
    position = torch.arange(20)
    for options in ({}, {"alpha": 0.0}, {"penalty": -1.0}):
        plain = poisoned(20, dtype=torch.int64), poisoned(20)
        mask = options.get("alpha", 0.1), options.get("penalty", -INF)
        draw = packed.draw(temperature, 5, position)
        cpu.sample(adapted, base, packed.mask(3.0, *mask), draw, *plain)
        for cut in (NO_CUT, {"top_k": 4000}, {"top_p": 1 - 1e-12}, {"min_p": 1e-30}):
            drawn = sample_cut(
                adapted, base, temperature=temperature, seed=5, position=position, **options, **cut
            )
            assert torch.equal(drawn[0], plain[0])
            torch.testing.assert_close(drawn[1], plain[1], rtol=1e-6, atol=1e-6)
        scored = score(adapted, base, plain[0], **options)
        torch.testing.assert_close(scored, plain[1], rtol=1e-6, atol=1e-6)


def test_wrong_arguments_raise():
    adapted, base = logits(2, 10)
    target, short = torch.zeros(2, dtype=torch.int64), torch.empty(1)
    for wrong in (target[:1], target - 1, target + 10, target.int()):
        with pytest.raises(RuntimeError):
            score(adapted, base, wrong)
        with pytest.raises(RuntimeError):
            project_strength(adapted, base, wrong)
    for call in (
        lambda: cpu.topk(adapted, base, packed.mask(1.0), 0, torch.empty(2, 0), target[:, None]),
        lambda: cpu.topk(adapted, base, packed.mask(1.0), 1, torch.empty(2, 2), target[:, None]),
        lambda: cpu.topk(adapted, base, packed.mask(1.0), 1, torch.empty(2, 1), torch.empty(2, 1)),
        lambda: cpu.divergence(adapted, base, short),
        lambda: cpu.divergence(adapted, base[:, :9], torch.empty(2)),
        lambda: cpu.steering_vector(adapted, base, torch.empty(2, 9)),
        lambda: cpu.score(adapted, base, packed.mask(1.0), target, short),
    ):
        with pytest.raises(RuntimeError):
            call()
