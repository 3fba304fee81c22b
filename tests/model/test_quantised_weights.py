"""Weights of codes: what they stand for, and a pair over them against one over those numbers."""

import copy
from functools import partial

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.model.layers import quantised
from svd_engine.model.layers.quantised import QuantisedEmbedding, QuantisedLinear
from tests.tiny import PROMPTS, tiny_base

LORA_OPTIONS = dict(target_modules="all-linear", r=4, task_type="CAUSAL_LM")
LORA = LoraConfig(**LORA_OPTIONS)


def by_hand(codes, bits, columns):
    """The numbers of a row of codes, one by one."""
    row = bytes(codes.tolist())
    block, header, size = (32, 4, 32) if bits == 8 else (64, 0, 36)
    found = []
    for start in range(header, len(row), size):
        if bits == 8:
            scales = [torch.frombuffer(bytearray(row[:4]), dtype=torch.float32).item()] * 2
            body = row[start : start + 32]
        else:
            pair = torch.frombuffer(bytearray(row[start : start + 4]), dtype=torch.bfloat16)
            scales, body = pair.float().tolist(), row[start + 4 : start + 36]
        for i in range(block):
            f, word = divmod(i, 8)
            value = int.from_bytes(body[4 * word : 4 * word + 4], "little")
            code = body[i] if bits == 8 else value >> (4 * f) & 15
            code -= (code >> (bits - 1)) << bits
            found.append(code * scales[word // 4])
    assert not any(found[columns:])
    return found[:columns]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("columns", [1, 31, 32, 64, 65, 96, 130])
def test_codes_stand_for_these_numbers(bits, columns):
    torch.manual_seed(columns)
    weight = torch.randn(5, columns)
    weight[1] = 0
    codes = quantised.quantise(weight, bits)
    plain = nn.Linear(columns, 5, bias=False)
    got = QuantisedLinear(codes, bits, plain).weight
    assert torch.equal(got, torch.tensor([by_hand(row, bits, columns) for row in codes]))
    # A code is at most half a step away, of int4 a whole one at the end that has one code less.
    step = weight.abs().amax(1, keepdim=True) / (127 if bits == 8 else 8)
    assert ((got - weight).abs() <= step * (0.501 if bits == 8 else 1.01)).all()
    assert (got[1] == 0).all()


def pair_over_codes(bits, architecture, config=None):
    """A PEFT model over a quantised base, and one over plain layers of the same numbers."""
    base = tiny_base(architecture.removesuffix(", tied"))
    if architecture.endswith("tied"):
        base.lm_head.weight = base.model.embed_tokens.weight
    quantised.quantise_linears(base, {8: "int8", 4: "int4"}[bits])
    plain = copy.deepcopy(base)
    for name, module in list(plain.named_modules()):
        if isinstance(module, QuantisedLinear):
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            linear.weight, linear.bias = nn.Parameter(module.weight), module.bias
            plain.set_submodule(name, linear)
        elif isinstance(module, QuantisedEmbedding):
            embedding = nn.Embedding(module.num_embeddings, module.embedding_dim)
            embedding.weight = nn.Parameter(module.weight)
            plain.set_submodule(name, embedding)
    assert architecture.endswith("tied") == isinstance(
        base.get_input_embeddings(), QuantisedEmbedding
    )
    models = []
    for model in (base, plain):
        peft = get_peft_model(model, copy.deepcopy(config or LORA)).eval()
        torch.manual_seed(1)
        for name, x in peft.named_parameters():
            if x.requires_grad:
                x.data = (1.0 if "ia3" in name or "magnitude" in name else 0.0) + (
                    0.1 * torch.randn_like(x)
                )
        models.append(peft)
    return models


CASES = {
    "llama": ("llama", LORA),
    "a tied head": ("llama, tied", LORA),
    "biases": ("qwen2", LORA),
    "windows and softcaps": ("gemma2", LORA),
    "DoRA": ("llama", LoraConfig(**LORA_OPTIONS, use_dora=True)),
    "IA3": ("llama", IA3Config(task_type="CAUSAL_LM")),
    "an adapted embedding": ("llama", LoraConfig(r=4, target_modules=["embed_tokens", "v_proj"])),
    "prefix": ("llama", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bits", [8, 4])
def test_tokens_are_those_of_peft_over_the_numbers(bits, case):
    over_codes, plain = pair_over_codes(bits, *CASES[case])
    engine = SteeredEngine(over_codes, steering=SteeringConfig(-3.0, alpha=0.1))
    assert engine.step.startswith("one native call")
    steering = SteeringConfig(-3.0, alpha=0.1)
    two_passes = SteeredEngine(plain, steering=steering, pairing="sequential")
    for options in ({}, {"temperature": 1.0, "seed": 3}):
        got, want = (
            each.generate(PROMPTS, max_new_tokens=24, **options) for each in (engine, two_passes)
        )
        assert [c.token_ids for c in got] == [c.token_ids for c in want]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_several_tokens_at_once_have_the_bits_of_one_at_a_time(bits, dtype):
    model, _ = pair_over_codes(bits, "llama, tied")
    pair = SteeredEngine(model.to(dtype))._pair
    tokens = torch.tensor([[9, 4, 7], [3, 1, 1], [5, 5, 2]])
    pair.prefill(PROMPTS[:3], 3)
    together = pair.extend(tokens)
    pair.prefill(PROMPTS[:3], 3)
    alone = [pair.extend(tokens[:, place : place + 1]) for place in range(3)]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts, 1))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda model: model.half(), "computes in float32 or bfloat16, and the base is float16"),
        (lambda model: model.lm_head.weight.data.fill_(torch.nan), "lm_head holds weights that"),
    ],
)
def test_weights_that_no_code_stands_for(change, told):
    model = tiny_base("llama")
    change(model)
    with pytest.raises(ValueError, match=told):
        quantised.quantise_linears(model, "int8")


@pytest.fixture
def folders(tmp_path, words):
    """Checkpoints and adapters by name."""
    for name, config in (
        ("llama", LORA),
        ("saved", LoraConfig(r=4, target_modules=["v_proj"], modules_to_save=["lm_head"])),
        ("gpt2", LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)),
    ):
        base = tiny_base("gpt2" if name == "gpt2" else "llama")
        base.save_pretrained(tmp_path / name / "base")
        words.save_pretrained(tmp_path / name / "base")
        get_peft_model(base, config).save_pretrained(tmp_path / name / "adapter")
    return tmp_path


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_memory_falls_and_the_engine_says_so(folders, weights):
    load = partial(SteeredEngine.from_pretrained, probe=False)
    plain, packed = (
        load(folders / "llama/base", folders / "llama/adapter", weights=w) for w in (None, weights)
    )
    assert packed.step == f"one native call, {weights} weights"
    assert held(packed) < held(plain) * 0.7


def held(engine):
    base = engine.model.get_base_model()
    return sum(x.numel() * x.element_size() for x in (*base.parameters(), *base.buffers()))


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("llama", {"weights": "int3"}, "weights must be int8 or int4; got 'int3'"),
        ("llama", {"weights": "int8", "device": "meta"}, "weights='int8' runs on the CPU"),
        ("saved", {"weights": "int8"}, "not for an adapter with modules_to_save"),
        ("gpt2", {"weights": "int4"}, "need native decode steps"),
    ],
)
def test_what_cannot_be_is_refused_by_name(folders, name, options, told):
    with pytest.raises(ValueError, match=told):
        SteeredEngine.from_pretrained(
            folders / name / "base", folders / name / "adapter", **options
        )
