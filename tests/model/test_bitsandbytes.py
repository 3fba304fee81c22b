"""QLoRA and other adapters on a base that bitsandbytes quantised: paired, as PEFT's two passes."""

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from svd_engine import SteeredEngine, SteeringConfig
from tests.tiny import PROMPTS, assert_same_tokens, teacher_forced_two_pass, tiny_base

pytest.importorskip("bitsandbytes")

LAYERS = dict(target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
METHODS = {
    "lora": LoraConfig(r=4, **LAYERS),
    "dora": LoraConfig(r=4, use_dora=True, **LAYERS),
    "ia3": IA3Config(feedforward_modules=["down_proj"], **LAYERS),
    "vera": VeraConfig(r=8, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
    "adalora": AdaLoraConfig(total_step=10, **LAYERS),
    "a saved head": LoraConfig(r=4, modules_to_save=["lm_head"], **LAYERS),
}
BASES = {
    "nf4": dict(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "int8": dict(load_in_8bit=True),
}  # fmt: skip
KINDS = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}
# int8 rounds activations too. There PEFT's own DoRA fails at its second pass.
CASES = [
    (kind, method) for kind in BASES for method in METHODS if (kind, method) != ("int8", "dora")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_base("llama").save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind, method", CASES)
def test_tokens_equal_two_passes_of_peft(folder, kind, method):
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**BASES[kind]), dtype=torch.float32
    )
    model = get_peft_model(base, METHODS[method]).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
    engine = SteeredEngine(model, steering=SteeringConfig(-2.0), pairing="paired")
    names = [type(module).__name__ for module in engine.pair.runner.model.modules()]
    assert names.count(KINDS[kind]) == 2 * 7
    for prompt, got in zip(PROMPTS, engine.generate(PROMPTS, max_new_tokens=8), strict=True):
        truth = teacher_forced_two_pass(model, prompt, got.token_ids, -2.0)
        assert_same_tokens(got.token_ids, truth, tie=1e-3 if kind == "nf4" else 0.1)
