"""A base quantised with torchao stays quantised, and both halves of the pair are right."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from svd_engine import SteeredEngine, SteeringConfig
from tests.tiny import assert_same_tokens, tiny_base, two_pass

quantization = pytest.importorskip("torchao.quantization")

LORA = LoraConfig(
    r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
)


@pytest.fixture(scope="module")
def model():
    base = tiny_base("llama")
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    model = get_peft_model(base, LORA).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)
    return model


def test_a_quantised_base_stays_quantised(model):
    engine = SteeredEngine(model, steering=SteeringConfig(-4.0), pairing="paired")
    tree = engine.pair.runner.model
    linears = [m for n, m in tree.named_modules() if n.endswith(("base_layer", "gate_proj"))]
    assert len(linears) == 2 * 4
    assert {type(m.weight).__name__ for m in linears} == {"Int8Tensor"}


@pytest.mark.parametrize("strength", [-4.0, 3.0])
def test_tokens_equal_two_pass(model, strength):
    engine = SteeredEngine(model, steering=SteeringConfig(strength), pairing="paired")
    prompts = [[5, 17, 40, 9, 33], [101], [7, 7, 120, 3], [200, 4]]
    for got, prompt in zip(engine.generate(prompts, max_new_tokens=8), prompts, strict=True):
        assert_same_tokens(got.token_ids, two_pass(model, prompt, 8, strength), tie=1e-3)
