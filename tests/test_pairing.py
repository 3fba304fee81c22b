"""The two halves of a pair are the base and the adapted model; the PEFT model stays as it was."""

import pytest
import torch
from conftest import CONFIGS, tiny_base, tiny_peft
from peft import AdaLoraConfig, IA3Config, LoraConfig, PromptTuningConfig, get_peft_model

from svd_engine import SteeredEngine, branches, pairing

PROMPT = torch.tensor([[5, 17, 40, 9, 33, 101, 7, 120, 3, 88, 61, 14]])
LORA = dict(r=4, task_type="CAUSAL_LM")
VARIANTS = {
    "patterns": LoraConfig(
        target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2},
        alpha_pattern={"down_proj": 32}, **LORA,
    ),
    "rslora": LoraConfig(target_modules=["q_proj", "up_proj"], use_rslora=True, **LORA),
    "lora bias": LoraConfig(target_modules=["q_proj"], lora_bias=True, **LORA),
    "all linear": LoraConfig(target_modules="all-linear", **LORA),
    "head": LoraConfig(target_modules=["lm_head", "v_proj"], **LORA),
    "embedding": LoraConfig(target_modules=["embed_tokens", "v_proj"], **LORA),
    "ia3": IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
}  # fmt: skip


@torch.inference_mode()
def both_logits(pair):
    """Adapted and base logits of the prompt, from a prefill and then a step."""
    hidden = pair.prefill(PROMPT[:, :-1], [PROMPT.shape[1] - 1], extra=1)
    first = pair.logits([h[:, -1] for h in hidden])
    return list(zip(first, pair.logits(pair.step(PROMPT[:, -1])), strict=True))


def check_halves(model, base, form):
    adapted_rows, base_rows = both_logits(branches.pair(model, form))
    for rows, whole in ((adapted_rows, model), (base_rows, base)):
        expected = whole(PROMPT).logits[0, -2:].detach()
        torch.testing.assert_close(torch.cat(rows), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_base_half_equals_base_and_adapted_half_equals_peft(architecture):
    check_halves(tiny_peft(architecture), tiny_base(architecture), "paired")


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_adapter(variant):
    check_halves(tiny_peft("llama", VARIANTS[variant]), tiny_base("llama"), "auto")


def test_the_peft_model_is_left_as_it_was():
    model = tiny_peft()
    model.train()
    before = {name: (type(m), m.training, id(m)) for name, m in model.named_modules()}
    attention = model.config._attn_implementation
    engine = SteeredEngine(model)
    engine.generate([[5, 6]], max_new_tokens=3)
    assert {name: (type(m), m.training, id(m)) for name, m in model.named_modules()} == before
    assert model.config._attn_implementation == attention
    assert model.get_base_model().config._attn_implementation == attention


def test_weights_are_shared():
    model = tiny_peft()
    own = {p.data_ptr() for p in model.parameters()}
    twin = pairing.paired(model)
    foreign = [n for n, p in twin.named_parameters() if p.data_ptr() not in own]
    assert not foreign


def test_what_cannot_be_paired_says_why():
    model = tiny_peft("llama", LoraConfig(use_dora=True, target_modules=["q_proj"], **LORA))
    with pytest.raises(ValueError, match=r"pairing='paired' is not possible: .*q_proj uses Dora"):
        SteeredEngine(model, pairing="paired")
    model = tiny_peft("llama", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="PROMPT_TUNING has no paired form"):
        SteeredEngine(model, pairing="paired")
    with pytest.raises(ValueError, match="pairing must be"):
        SteeredEngine(tiny_peft(), pairing="both")


def test_a_base_that_is_gone_is_refused():
    config = LoraConfig(target_modules=["q_proj"], bias="lora_only", **LORA)
    with pytest.raises(ValueError, match="bias='lora_only'"):
        SteeredEngine(get_peft_model(tiny_base("qwen2"), config))
    merged = tiny_peft()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged adapter"):
        SteeredEngine(merged)
    disabled = tiny_peft()
    disabled.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="disabled adapter"):
        SteeredEngine(disabled)
    with pytest.raises(ValueError, match="must be a PeftModel"):
        SteeredEngine(tiny_base("llama"))


def test_other_tuners_decode_in_sequence():
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=10, task_type="CAUSAL_LM")
    check_halves(tiny_peft("llama", config), tiny_base("llama"), "auto")
