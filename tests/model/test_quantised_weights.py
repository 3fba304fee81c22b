"""Weights of codes: what they stand for, and a pair over them against one over those numbers."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.model.layers import quantised
from svd_engine.model.layers.quantised import QuantisedEmbedding, QuantisedLinear
from tests.tiny import PROMPTS, tiny_base


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
            code = value >> (bits * f) & (1 << bits) - 1
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


def pair_over_codes(bits, dtype, architecture):
    """A PEFT model over a quantised base, and one over plain layers of the same numbers."""
    base = tiny_base(architecture.removesuffix(", tied")).to(dtype)
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
        torch.manual_seed(1)
        peft = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4))
        for name, x in peft.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(x, std=0.1)
        models.append(peft.eval())
    return models


@pytest.mark.parametrize("architecture", ["llama", "llama, tied", "qwen2", "gemma2"])
@pytest.mark.parametrize("bits", [8, 4])
def test_tokens_are_those_of_peft_over_the_numbers(bits, architecture):
    over_codes, plain = pair_over_codes(bits, torch.float32, architecture)
    engine = SteeredEngine(over_codes, steering=SteeringConfig(-3.0, alpha=0.1))
    assert engine.step.startswith("one native call")
    two_passes = SteeredEngine(
        plain, steering=SteeringConfig(-3.0, alpha=0.1), pairing="sequential"
    )
    for options in ({}, {"temperature": 1.0, "seed": 3}):
        got, want = (
            each.generate(PROMPTS, max_new_tokens=24, **options) for each in (engine, two_passes)
        )
        assert [c.token_ids for c in got] == [c.token_ids for c in want]
