"""An engine whose PEFT model changes: it says so, or it decodes what it was made of."""

import copy
import re

import pytest
import torch
from peft import (
    CartridgeConfig,
    CPTConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)
from transformers import LogitsProcessorList

from svd_engine import SteeredEngine, SteeringConfig, SteeringLogitsProcessor, steered_generate
from tests.tiny import tiny_base, tiny_peft

PROMPT = [5, 17, 40, 9, 33]
LORA = dict(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
CONFIGS = {
    "lora": None,
    "lora on the embedding": LoraConfig(**LORA | dict(target_modules=["embed_tokens", "lm_head"])),
    "dora": LoraConfig(use_dora=True, **LORA),
    "loha": LoHaConfig(**LORA),
    "saved modules": LoraConfig(modules_to_save=["lm_head"], trainable_token_indices=[5], **LORA),
    "a parameter": LoraConfig(
        target_modules=[], target_parameters=["v_proj.weight"], r=4, task_type="CAUSAL_LM"
    ),
    "ia3": IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
    "prompt": PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "cartridge": CartridgeConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "cpt": CPTConfig(
        cpt_token_ids=[5, 6, 7, 8], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4],
        task_type="CAUSAL_LM",
    ),
}  # fmt: skip
CALLS = {
    "generate": lambda engine: engine.generate(PROMPT, max_new_tokens=2),
    "adapted": lambda engine: engine.generate(PROMPT, model="adapted", max_new_tokens=2),
    "base": lambda engine: engine.generate(PROMPT, model="base", max_new_tokens=2),
    "stream": lambda engine: list(engine.stream(PROMPT, max_new_tokens=2)),
    "astream": lambda engine: engine.astream(PROMPT, max_new_tokens=2),
    "score": lambda engine: engine.score(PROMPT, [[5, 7]]),
    "calibrate": lambda engine: engine.calibrate(
        [dict(prompt=[5], completion=[7, i], rejected=[[9]]) for i in range(6)]
    ),
    "warmup": lambda engine: engine.warmup(max_length=8),
    "pair": lambda engine: engine.pair,
}


def own_weights(model):
    return [weight for weight in model.parameters() if weight.requires_grad]


def query(model):
    return model.get_base_model().model.layers[0].self_attn.q_proj


@torch.no_grad()
def write(weight):
    weight.mul_(1.5)


def replace(weight):
    weight.data = weight.data * 1.5


def assign(model):
    query(model).lora_A["default"].weight = torch.nn.Parameter(torch.randn(4, 32))


def train(model):
    optimizer = torch.optim.AdamW(own_weights(model))
    model(torch.tensor([PROMPT])).logits.square().sum().backward()
    optimizer.step()


def load_again(model, folder):
    other = tiny_peft()
    write(own_weights(other)[0])
    other.save_pretrained(folder)
    model.load_adapter(folder, "default")


def another(model):
    model.add_adapter("other", LoraConfig(**LORA))
    model.set_adapter("other")


def made_anew(model):
    model.add_adapter("other", LoraConfig(**LORA))
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(**LORA))
    model.set_adapter("default")


def load_base(model):
    model.get_base_model().model.norm.load_state_dict({"weight": torch.full((32,), 0.5)})


CHANGES = {
    "merged adapter": lambda model, _: model.merge_adapter(),
    "merged adapter in ": lambda model, _: model.merge_and_unload(),
    "disabled adapter": lambda model, _: model.base_model.disable_adapter_layers(),
    "active adapter of model is other": lambda model, _: another(model),
    "active adapter of": lambda model, _: query(model).set_adapter([]),
    "lora_A.default.weight has": lambda model, _: write(query(model).lora_A["default"].weight),
    "lora_B.default.weight has": lambda model, _: replace(query(model).lora_B["default"].weight),
    "q_proj.lora_A.default.weight": lambda model, _: assign(model),
    "lora_A.default has": lambda model, _: made_anew(model),
    "lora_[AB].default.weight": lambda model, _: train(model),
    "lora_A.default.weight has changed since": load_again,
    "scale of .*q_proj has": lambda model, _: query(model).set_scale("default", 3.0),
    "q_proj.base_layer.weight has": lambda model, _: write(query(model).base_layer.weight),
    "embed_tokens.weight has": lambda model, _: replace(
        model.get_base_model().model.embed_tokens.weight
    ),
    "norm.weight has": lambda model, _: load_base(model),
    "weight has changed": lambda model, _: model.to(torch.bfloat16),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_an_error_that_names_it(what, tmp_path):
    model = tiny_peft()
    engine = SteeredEngine(model, steering=SteeringConfig(-2.0))
    engine.generate(PROMPT, max_new_tokens=2)
    CHANGES[what](model, tmp_path)
    for call in CALLS.values():
        with pytest.raises(ValueError, match=what):
            call(engine)


@pytest.mark.parametrize("config", ["prompt", "prefix", "cartridge", "cpt"])
def test_a_change_of_virtual_tokens_is_an_error(config):
    model = tiny_peft("llama", CONFIGS[config])
    engine = SteeredEngine(model)
    write(own_weights(model)[0])
    with pytest.raises(ValueError, match=r"prompt_encoder.default.*embedding.* has changed"):
        engine.generate(PROMPT, max_new_tokens=2)


@pytest.mark.parametrize("config", CONFIGS)
def test_what_is_no_change(config, tmp_path):
    model = tiny_peft("llama", CONFIGS[config])
    engine = SteeredEngine(model, steering=SteeringConfig(-2.0))
    before = engine.generate(PROMPT, max_new_tokens=4)[0].token_ids
    model.train()
    model(torch.tensor([PROMPT])).logits.sum().backward()
    model.eval()
    model.generate(torch.tensor([PROMPT]), max_new_tokens=2)
    with model.disable_adapter():
        model(torch.tensor([PROMPT]))
    if CONFIGS[config] is None:
        model.add_adapter("other", LoraConfig(init_lora_weights=False, **LORA))
        write(query(model).lora_A["other"].weight)
        model.set_adapter("other")
        model.set_adapter("default")
    model.save_pretrained(tmp_path)
    for weight in model.parameters():
        weight.requires_grad_(False)
    assert engine.generate(PROMPT, max_new_tokens=4)[0].token_ids == before


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_all_of_the_adapter_is_copied(config):
    """Some optimizers write to weights behind PyTorch's back."""
    model = tiny_peft("llama", CONFIGS[config])
    trained = copy.deepcopy(model)
    engine = SteeredEngine(model, steering=SteeringConfig(-2.0))
    for weight in own_weights(model):
        weight.data.mul_(1.5)
    steered = engine.pair.logits(engine.pair.prefill([PROMPT]))
    alone = engine._decoded("generation", "adapted")[1]
    (adapted,) = alone.logits(alone.prefill([PROMPT]))
    truth = trained(torch.tensor([PROMPT])).logits[:, -1]
    torch.testing.assert_close(steered[0], truth, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(adapted, truth, atol=1e-4, rtol=1e-5)
    base = tiny_base("llama")(torch.tensor([PROMPT])).logits[:, -1]
    torch.testing.assert_close(steered[1], base, atol=1e-4, rtol=1e-5)


def test_an_adapter_that_was_merged_for_a_while():
    model = tiny_peft()
    engine = SteeredEngine(model, steering=SteeringConfig(-2.0))
    before = engine.generate(PROMPT, max_new_tokens=4)[0].token_ids
    model.merge_adapter()
    with pytest.raises(ValueError, match=re.escape("Call unmerge_adapter() first")):
        engine.generate(PROMPT, max_new_tokens=4)
    model.unmerge_adapter()
    assert engine.generate(PROMPT, max_new_tokens=4)[0].token_ids == before


@pytest.mark.parametrize(
    "config", ["lora", "dora", "loha", "saved modules", "a parameter", "prefix"]
)
def test_generate_follows_a_change(config):
    model = tiny_peft("llama", CONFIGS[config])
    steered = dict(custom_generate=steered_generate, steering=SteeringConfig(-2.0))

    def check():
        got = model.generate(torch.tensor([PROMPT]), max_new_tokens=6, do_sample=False, **steered)
        engine = SteeredEngine(copy.deepcopy(model), steering=SteeringConfig(-2.0))
        assert (
            got[0, len(PROMPT) :].tolist() == engine.generate(PROMPT, max_new_tokens=6)[0].token_ids
        )

    check()
    for weight in own_weights(model):
        write(weight)
    check()
    for weight in own_weights(model):
        weight.data.mul_(1.5)
    check()
    replace(model.get_base_model().model.norm.weight)
    check()
    for layer in model.get_base_model().model.layers:
        write(layer.mlp.down_proj.weight)
    check()
    model.get_base_model().model.norm.weight = torch.nn.Parameter(torch.full((32,), 0.7))
    check()


def test_the_processor_refuses_a_base_that_has_changed():
    model = tiny_peft()
    processor = SteeringLogitsProcessor(model, SteeringConfig(-2.0))
    options = dict(
        logits_processor=LogitsProcessorList([processor]), max_new_tokens=4, do_sample=False
    )
    ids = torch.tensor([PROMPT])
    model.generate(ids, **options)
    for weight in own_weights(model):
        write(weight)  # the adapted model's scores are those that generate computes
    engine = SteeredEngine(model, steering=SteeringConfig(-2.0))
    got = model.generate(ids, **options)[0, len(PROMPT) :].tolist()
    assert got == engine.generate(PROMPT, max_new_tokens=4)[0].token_ids
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapter"):
        model.generate(ids, **options)
    model.unmerge_adapter()
    write(model.get_base_model().model.norm.weight)
    with pytest.raises(ValueError, match=r"norm.weight has changed"):
        model.generate(ids, **options)
