"""What lies between the linear layers of a decode step: kernels, and which norms are known."""

import pytest
import torch
from torch import nn

from svd_engine.model.layers import attention, feed_forward, linear
from svd_engine.model.module_tree import base_tree, paired_tree
from svd_engine.model.peft_adapter import Adapter
from svd_engine.model.runner import ModelRunner
from svd_engine.model.step import rms_norm
from svd_engine.ops import cpu
from svd_engine.ops.head import softcapped
from tests.model import test_linear
from tests.tiny import CONFIGS, tiny_base, tiny_peft

F32, BF16 = torch.float32, torch.bfloat16
NAN = float("nan")
needs_library = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
each_capability = test_linear.each_capability  # a fixture


@pytest.fixture(autouse=True)
def one_thread_and_no_grad():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


def normal(*shape, dtype=F32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poison(*shape, dtype=F32):
    return torch.full(shape, NAN, dtype=dtype)


def close(got, want, scale=1.0):
    """Within a few roundings of float32, or two of bfloat16."""
    assert not got.isnan().any()
    rounding = 4e-7 if got.dtype == F32 else 3 * 2**-9
    torch.testing.assert_close(got.double(), want, rtol=rounding, atol=scale * rounding)


def native_rms_norm(x, weight, eps=1e-6, form=rms_norm.FORMS[0]):
    out = poison(*x.shape, dtype=x.dtype)
    cpu.rms_norm(x, weight, eps, *form, out)
    return out


@needs_library
@pytest.mark.usefixtures("each_capability")
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("form", rms_norm.FORMS)
@pytest.mark.parametrize("n", [1, 3, 16, 31, 577])
def test_rms_norm(n, form, dtype):
    x, weight = normal(2, 3, n, dtype=dtype), normal(n, dtype=dtype, seed=1)
    got = native_rms_norm(x, weight, 1e-3, form)
    wide = x.double()
    scale = (wide.pow(2).mean(-1, keepdim=True) + 1e-3).rsqrt()
    close(got, wide * scale * (weight.double() + form.offset), scale=2)
    if dtype == BF16:  # at most where float32 falls beside a tie
        assert (got != rms_norm.composed(x, weight, 1e-3, form)).sum() <= got.numel() // 200
    for row in range(3):
        assert torch.equal(
            native_rms_norm(x[:, row : row + 1].clone(), weight, 1e-3, form)[:, 0], got[:, row]
        )
    x[1, 2, -1] = NAN
    spoiled = native_rms_norm(x, weight, 1e-3, form)
    assert spoiled[1, 2].isnan().all()
    assert torch.equal(spoiled[0], got[0]) and torch.equal(spoiled[1, :2], got[1, :2])


def turned(x, cos, sin):
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], -1) * sin


@needs_library
@pytest.mark.usefixtures("each_capability")
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("dim", [2, 6, 32, 70, 128])
def test_rotate(dim, dtype):
    x = normal(3, 1, 5, dim, dtype=dtype).transpose(1, 2)
    cos, sin = (normal(3, 1, 1, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    out = poison(*x.shape, dtype=dtype)
    cpu.rotate(x, cos, sin, out)
    close(out, turned(x.double(), cos.double(), sin.double()), scale=8)
    if dtype == BF16:
        assert torch.equal(out, turned(x, cos, sin))


def truth(query, key, value, mask, scale, softcap):
    rows, heads, _, dim = query.shape
    packed = query.double().view(rows, key.shape[1], -1, dim)
    scores = packed @ key.double().transpose(-1, -2) * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if mask is not None:
        scores = scores + mask.double()
    return (scores.softmax(-1) @ value.double()).reshape(rows, 1, heads, -1)


def attend(query, key, value, mask=None, scale=0.3, softcap=None):
    rows, heads, _, _ = query.shape
    out = poison(rows, 1, heads, value.shape[3], dtype=query.dtype)
    cpu.attend(query, key, value, mask, scale, softcap, out)
    return out


def attention_case(rows, kv_heads, group, slots, dim, out_dim, dtype=F32):
    """Keys and values are parts of a larger cache whose other slots are NaN."""
    query = normal(rows, kv_heads * group, 1, dim, dtype=dtype)
    parts = []
    for width, seed in ((dim, 1), (out_dim, 2)):
        memory = poison(rows + 1, kv_heads, slots + 3, width, dtype=dtype)
        memory[:rows, :, :slots] = normal(rows, kv_heads, slots, width, dtype=dtype, seed=seed)
        parts.append(memory[:rows, :, :slots])
    visible = torch.randint(0, slots, (rows,), generator=torch.Generator().manual_seed(3))
    visible[0] = slots - 1
    return query, *parts, attention.causal_mask(visible[:, None], slots, dtype)


@needs_library
@pytest.mark.usefixtures("each_capability")
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1, 8, 8), (2, 3, 3, 61, 64, 64), (3, 2, 7, 18, 10, 10), (2, 1, 9, 130, 70, 50)],
)
def test_attend(sizes, dtype):
    query, key, value, mask = attention_case(*sizes, dtype=dtype)
    for hidden in (None, mask):
        for softcap in (None, 5.0):
            arguments = query, key, value, hidden, 0.3, softcap
            close(attend(*arguments), truth(*arguments), scale=4)


@needs_library
@pytest.mark.usefixtures("each_capability")
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_same_bits_alone_and_in_a_batch(dtype):
    query, key, value, mask = attention_case(5, 2, 3, 77, 24, 24, dtype)
    whole = attend(query, key, value, mask)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(attend(query, key, value, mask), whole)
    for row in range(5):
        seen = int((mask[row] == 0).sum())
        one = slice(row, row + 1)
        alone = attend(query[one], key[one, :, :seen], value[one, :, :seen])
        assert torch.equal(alone, whole[one])


@needs_library
@pytest.mark.usefixtures("each_capability")
def test_a_nan_stays_in_its_row_and_head():
    query, key, value, _ = attention_case(3, 2, 2, 20, 8, 8)
    clean = attend(query, key, value)
    query[1, 3, 0, 2] = NAN
    key[2, 0, 5, 1] = NAN
    got = attend(query, key, value)
    assert got[1, :, 3].isnan().all() and got[2, :, :2].isnan().all()
    assert torch.equal(got[0], clean[0])
    assert torch.equal(got[1, :, :3], clean[1, :, :3]) and torch.equal(
        got[2, :, 2:], clean[2, :, 2:]
    )


@needs_library
def test_wrong_arguments_raise():
    query, key, value, mask = attention_case(2, 2, 2, 6, 8, 8)
    x, weight = normal(2, 8), normal(8)
    for call in (
        lambda: attend(query[:, :3], key, value),
        lambda: attend(query, key[:1], value),
        lambda: attend(query, key, value[:, :, :5]),
        lambda: attend(query, key.to(BF16), value),
        lambda: attend(query, key, value, mask[..., :5]),
        lambda: attend(query.repeat(1, 1, 2, 1), key, value),
        lambda: attend(query.double(), key.double(), value.double()),
        lambda: native_rms_norm(x, weight[:7]),
        lambda: native_rms_norm(x, weight.to(BF16)),
        lambda: native_rms_norm(x.T, weight[:2]),
        lambda: cpu.rotate(query, query[:, :1], query[:1, :1], torch.empty_like(query)),
        lambda: cpu.rotate(query[..., :7], *[query[:, :1, :, :7]] * 2, query[..., :7]),
    ):
        with pytest.raises(RuntimeError):
            call()


@needs_library
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("sliding_window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_attention_is_the_same_with_and_without_the_kernel(
    monkeypatch, softcap, sliding_window, dtype
):
    query, key, value, mask = attention_case(3, 2, 2, 19, 8, 8, dtype)
    last = (mask == 0).sum(-1).view(3, 1) - 1
    options = dict(softcap=softcap, sliding_window=sliding_window, position_ids=last)
    got, _ = attention.attend(nn.Module(), query, key, value, mask, 0.4, **options)
    key, value = key.clone(), value.clone()
    monkeypatch.setattr(linear, "most_rows", lambda dtype: 0)
    want, _ = attention.attend(nn.Module(), query, key, value, mask, 0.4, **options)
    assert got.shape == want.shape
    torch.testing.assert_close(
        got, want, rtol=2**-7 if dtype == BF16 else 1e-5, atol=1e-2 if dtype == BF16 else 1e-6
    )


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_softcap_is_that_of_gemma(softcap, dtype):
    x = 10 * normal(3, 5, dtype=dtype)
    capped = x if softcap is None else softcap * torch.tanh(x / softcap)
    assert torch.equal(softcapped(x, softcap), capped)


NORMED = {"llama": 0, "qwen2": 0, "qwen3": 0, "mistral": 0, "gemma2": 2}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_norm_is_recognised_and_no_other_module(architecture, dtype):
    model = tiny_base(architecture).to(dtype)
    found = {name: rms_norm.recognise(module) for name, module in model.named_modules()}
    norms = {name for name, module in model.named_modules() if "RMSNorm" in type(module).__name__}
    assert {name for name, form in found.items() if form} == norms
    assert bool(norms) == (architecture in NORMED)
    for name in norms:
        assert found[name][1] == rms_norm.FORMS[NORMED[architecture]]


class OtherRMSNorm(nn.Module):
    """The name and the attributes of one, and another arithmetic."""

    def __init__(self, n):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), 1e-6

    def forward(self, x):
        return self.weight * x / (x.norm(dim=-1, keepdim=True) + self.eps)


def test_another_norm_is_not_recognised():
    assert rms_norm.recognise(OtherRMSNorm(8)) is None


@needs_library
@pytest.mark.skipif(not linear.most_rows(F32), reason="the native linear is not faster here")
def test_a_walk_attends_natively_and_a_prefill_does_not(monkeypatch):
    calls, kernel = [], cpu.attend
    monkeypatch.setattr(cpu, "attend", lambda *a: (calls.append(a[0].shape), kernel(*a)))
    model = tiny_peft("llama")
    classes = [type(module) for module in model.modules()]
    runner = ModelRunner(paired_tree(Adapter.read(model)), paired=True)
    assert [type(module) for module in model.modules()] == classes
    runner.prefill([[3, 4, 5]] * 2, max_new_tokens=2)
    assert not calls
    hooked = []
    decoder = runner.model.get_decoder()
    decoder.norm.register_forward_hook(lambda module, x, y: hooked.append(y))
    hidden = runner.extend(torch.tensor([[7], [7]]))
    assert torch.equal(hooked[0], hidden)
    assert len(calls) == len(decoder.layers)


def test_attention_takes_what_a_gpu_returns(monkeypatch):
    """There the kernels of scaled_dot_product_attention put the heads behind the positions."""
    query, key, value = (normal(2, heads, 3, 8, seed=heads) for heads in (4, 2, 2))
    right, _ = attention.attend(nn.Module(), query, key, value, None)
    sdpa = attention.scaled_dot_product_attention

    def behind(*arguments, **options):
        return sdpa(*arguments, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", behind)
    assert torch.equal(attention.attend(nn.Module(), query, key, value, None)[0], right)


@pytest.fixture
def causal_calls(monkeypatch):
    """The arguments of every attention that needs no mask, as if there were a kernel for it."""
    calls, compute = [], attention.scaled_dot_product_attention

    def record(query, key, value, **options):
        if "is_causal" in options:
            calls.append((query.shape[2], key.shape[1], options))
        return compute(query, key, value, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", record)
    monkeypatch.setattr(attention, "_has_causal_kernel", lambda *_: True)
    return calls


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("lengths", [(7, 7), (7, 4)])  # padding on the right is hidden as well
def test_prompts_from_the_first_slot_need_no_mask(architecture, lengths, causal_calls, monkeypatch):
    model = tiny_base(architecture)
    prompts = [list(range(3, 3 + length)) for length in lengths]
    runner = ModelRunner(base_tree(Adapter.read(tiny_peft(architecture))))
    got = runner.prefill(prompts, max_new_tokens=2)
    config = model.config
    kind = {"is_causal": True, "enable_gqa": True}
    assert len(causal_calls) == config.num_hidden_layers
    for length, kv_heads, options in causal_calls:
        assert (length, kv_heads) == (7, config.num_key_value_heads)
        assert kind.items() <= options.items() and "attn_mask" not in options
    monkeypatch.setattr(attention, "_has_causal_kernel", lambda *_: False)
    torch.testing.assert_close(got, runner.prefill(prompts, max_new_tokens=2))
    assert len(causal_calls) == config.num_hidden_layers


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("softcap, sinks", [(None, False), (5.0, False), (None, True)])
@pytest.mark.parametrize("length", [128, 300])
def test_a_prompt_attends_in_blocks(length, softcap, sinks, window, dtype, monkeypatch):
    query, key = (normal(2, heads, length, 8, dtype=dtype, seed=heads) for heads in (4, 2))
    value, s_aux = normal(2, 2, length, 3, dtype=dtype, seed=1), normal(4, dtype=dtype, seed=5)
    positions = torch.arange(length)[None]
    mask = attention.causal_mask(positions, length, dtype)
    seen, compute = [], attention._composed
    monkeypatch.setattr(
        attention, "_composed", lambda *of: (seen.append(of[1].shape[2]), compute(*of))[1]
    )
    with attention.causal(mask):
        got, _ = attention.attend(
            nn.Module(), query, key, value, mask, sliding_window=window, softcap=softcap,
            position_ids=positions, s_aux=s_aux if sinks else None,
        )  # fmt: skip
    assert seen == [*range(128, length, 128), length]
    slots = torch.arange(length)
    hidden = slots > slots[:, None]
    if window:
        hidden |= slots <= slots[:, None] - window
    for head in range(4):
        scores = query[:, head].double() @ key[:, head // 2].double().mT * 8**-0.5
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        scores.masked_fill_(hidden, -torch.inf)
        if sinks:
            scores = torch.cat([scores, s_aux[head].double().expand(2, length, 1)], -1)
        want = scores.softmax(-1)[..., :length] @ value[:, head // 2].double()
        close(got[:, :, head], want, scale=8)


def test_what_hides_more_than_later_slots_keeps_its_mask(causal_calls):
    runner = ModelRunner(base_tree(Adapter.read(tiny_peft("llama"))))
    runner.prefill([[5, 3, 8]] * 2, max_new_tokens=4)
    causal_calls.clear()
    runner.extend(torch.tensor([[4, 9], [2, 1]]))  # not from the first slot
    query, key = normal(1, 4, 5, 8), normal(1, 2, 5, 8)
    mask = attention.causal_mask(torch.arange(5)[None], 5, F32)
    of = dict(module=nn.Module(), query=query, key=key, value=key)
    with attention.causal(mask):
        attention.attend(attention_mask=mask, softcap=20.0, **of)
        attention.attend(attention_mask=mask, s_aux=normal(4), **of)
        attention.attend(
            attention_mask=mask, sliding_window=3, position_ids=torch.arange(5)[None], **of
        )
        attention.attend(attention_mask=mask.clone(), **of)
        assert causal_calls == []
        attention.attend(attention_mask=mask, sliding_window=5, **of)
    assert len(causal_calls) == 1


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@torch.inference_mode(False)
def test_a_gate_is_multiplied_in_pieces(architecture, dtype, monkeypatch):
    monkeypatch.setattr(feed_forward, "PIECE", 200)  # 4 rows
    plain = tiny_base(architecture).to(dtype).model.layers[0].mlp
    ours = base_tree(Adapter.read(tiny_peft(architecture).to(dtype))).model.layers[0].mlp
    sizes: list[int] = []
    ours.act_fn.register_forward_hook(lambda module, x, y: sizes.append(len(y)))
    x = normal(2, 9, 32, dtype=dtype).requires_grad_()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x))
    assert sizes == [4, 4, 4, 4, 2]
    ours(x).sum().backward()
    assert x.grad is not None and sizes[5:] == [2]


def test_another_feed_forward_layer_is_left_alone():
    class Mlp(nn.Module):
        def forward(self, x):
            down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))
            return down_proj

    layer = Mlp()
    feed_forward.multiply_in_pieces(layer)
    assert type(layer) is Mlp
