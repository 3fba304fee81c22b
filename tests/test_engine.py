"""The engine against plain two-pass PEFT, token for token."""

import pytest
import torch
from conftest import CONFIGS, VOCAB, assert_same_tokens, tiny_peft, two_pass
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

from svd_engine import SteeredEngine, SteeringConfig

PROMPTS = [[5, 17, 40, 9, 33], [101], [7, 7, 120, 3, 88, 61, 14, 90, 55], [200, 4]]
SEQUENTIAL = {
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "prompt": PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "p-tuning": PromptEncoderConfig(
        num_virtual_tokens=5, encoder_hidden_size=16, task_type="CAUSAL_LM"
    ),
    "prefix": PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}  # fmt: skip


@pytest.mark.parametrize("strength", [-4.0, 0.0, 3.0])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_ragged_batch_equals_two_pass(architecture, strength):
    model = tiny_peft(architecture)
    engine = SteeredEngine(model, steering=SteeringConfig(strength), pairing="paired")
    for got, prompt in zip(engine.generate(PROMPTS, max_new_tokens=12), PROMPTS, strict=True):
        assert_same_tokens(got.token_ids, two_pass(model, prompt, 12, strength), tie=1e-3)


@pytest.mark.parametrize("method", SEQUENTIAL)
def test_sequential_methods_equal_two_pass(method):
    model = tiny_peft("llama", SEQUENTIAL[method])
    engine = SteeredEngine(model, steering=SteeringConfig(-4.0))
    for got, prompt in zip(engine.generate(PROMPTS, max_new_tokens=12), PROMPTS, strict=True):
        assert_same_tokens(got.token_ids, two_pass(model, prompt, 12, -4.0), tie=1e-3)
