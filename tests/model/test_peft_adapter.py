"""What can be paired, what cannot and why; the PEFT model stays as it was found."""

import copy
import importlib
import logging

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.model.adapter_layers import Halves
from svd_engine.model.module_tree import paired_tree
from svd_engine.model.pair import pair_models
from svd_engine.model.peft_adapter import Adapter
from tests.tiny import (
    CONFIGS,
    PROMPTS,
    assert_same_tokens,
    teacher_forced_two_pass,
    tiny_base,
    tiny_peft,
)

PROMPT = torch.tensor([[5, 17, 40, 9, 33, 101, 7, 120, 3, 88, 61, 14]])
LORA = dict(r=4, task_type="CAUSAL_LM")
IA3 = IA3Config(
    target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
)
NOT_PAIRED = {
    "mlp is more than a layer": LoraConfig(
        target_modules=["q_proj"], modules_to_save=["mlp"], **LORA
    ),
}


@torch.inference_mode()
def check_halves(model, base, form):
    pair = pair_models(Adapter.read(model), form)
    logits = pair.logits(pair.prefill(PROMPT.tolist()))
    for rows, whole in zip(logits, (model, base), strict=True):
        torch.testing.assert_close(rows, whole(PROMPT).logits[:, -1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "config", [None, IA3, PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")]
)
def test_the_peft_model_is_left_as_it_was(config):
    model = tiny_peft("llama", config)
    model.train()
    before = {name: (type(m), m.training, id(m)) for name, m in model.named_modules()}
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    attention = model.config._attn_implementation
    engine = SteeredEngine(model)
    engine.generate([[5, 6]], max_new_tokens=3)
    assert {name: (type(m), m.training, id(m)) for name, m in model.named_modules()} == before
    assert model.config._attn_implementation == attention
    assert model.get_base_model().config._attn_implementation == attention
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])


@pytest.mark.parametrize("config", [None, IA3, LoraConfig(use_dora=True, **LORA)])
def test_the_peft_model_is_walked_once_and_each_layer_looked_at_once(config, monkeypatch):
    model = tiny_peft("llama", config)
    layers = list(model.get_base_model().model.layers)
    own, walked, named_modules = set(model.modules()), [], nn.Module.named_modules

    def counted(self, memo=None, *args, **kwargs):
        if memo is None and self in own:
            walked.append(self)
        return named_modules(self, memo, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    engine = SteeredEngine(model, probe=False)
    for alone in ("adapted", "base"):
        engine.generate([5, 6], model=alone, max_new_tokens=2)
    assert walked == [model, *layers]


@pytest.mark.parametrize("config", [None, IA3])
def test_weights_are_shared(config):
    model = tiny_peft("llama", config)
    own = {p.data_ptr() for p in model.parameters()}
    twin = paired_tree(Adapter.read(model))
    foreign = [n for n, p in twin.named_parameters() if p.data_ptr() not in own]
    assert not foreign


@pytest.mark.parametrize("reason", NOT_PAIRED)
def test_what_cannot_be_paired_says_why_and_decodes_in_sequence(reason, caplog):
    model = tiny_peft("llama", NOT_PAIRED[reason])
    with pytest.raises(ValueError, match=rf"pairing='paired' is not possible: .*{reason}"):
        SteeredEngine(model, pairing="paired")
    with caplog.at_level(logging.WARNING, "svd_engine"):
        SteeredEngine(model)
    assert [reason in record.message for record in caplog.records] == [True]
    check_halves(model, tiny_base("llama"), "auto")


# Those with arithmetic of their own, those whose halves each have a layer, and both together.
MANY = {
    "dora": LoraConfig(use_dora=True, target_modules=["q_proj", "down_proj", "lm_head"], **LORA),
    "dora on embeddings": LoraConfig(use_dora=True, target_modules=["embed_tokens"], **LORA),
    "adalora": AdaLoraConfig(target_modules=["q_proj"], total_step=10, task_type="CAUSAL_LM"),
    "a saved head": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **LORA),
    "saved norms": LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"], **LORA),
    "trained tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5], **LORA),
    "vera": VeraConfig(target_modules=["q_proj"], r=8, task_type="CAUSAL_LM"),
    "loha": LoHaConfig(target_modules=["q_proj", "down_proj"], r=4, task_type="CAUSAL_LM"),
    "oft": OFTConfig(target_modules=["q_proj"], oft_block_size=4, task_type="CAUSAL_LM"),
}
WITH_BIASES = {"dora", "adalora", "vera", "loha", "oft"}  # in the layers of Qwen2


@pytest.mark.parametrize("method", MANY)
def test_many_methods_pair_and_steer_as_plain_peft_does(method):
    architecture = "qwen2" if method in WITH_BIASES else "llama"
    model = tiny_peft(architecture, MANY[method])
    check_halves(model, tiny_base(architecture), "paired")
    for walks in (False, True):
        engine = SteeredEngine(model, steering=SteeringConfig(-2.0), pairing="paired")
        if walks:
            engine.pair.runner.native = None
        for prompt, got in zip(PROMPTS, engine.generate(PROMPTS, max_new_tokens=6), strict=True):
            truth = teacher_forced_two_pass(model, prompt, got.token_ids, -2.0)
            assert_same_tokens(got.token_ids, truth, tie=1e-3)


@pytest.mark.parametrize(
    "kind", ["awq.AwqLoraLinear", "gptq.GPTQLoraLinear", "aqlm.AqlmLoraLinear"]
)
def test_peft_has_a_class_for_each_kind_of_quantised_layer(kind):
    """They compute what the one for plain layers does; here over plain layers."""
    module, name = kind.split(".")
    cls = getattr(importlib.import_module(f"peft.tuners.lora.{module}"), name)
    config = LoraConfig(target_modules=["q_proj", "down_proj"], **LORA)
    model = tiny_peft("llama", config)
    want = model(PROMPT).logits
    for layer in model.get_base_model().model.layers:
        for parent, last in ((layer.self_attn, "q_proj"), (layer.mlp, "down_proj")):
            old = getattr(parent, last)
            new = cls(old.base_layer, "default", config=config, r=4, lora_alpha=8)
            new.lora_A, new.lora_B = old.lora_A, old.lora_B
            new.scaling = old.scaling
            setattr(parent, last, new)
    pair = pair_models(Adapter.read(model.eval()), "paired")
    assert not any(isinstance(x, Halves) for x in pair.runner.model.modules())
    adapted, base = pair.logits(pair.prefill(PROMPT.tolist()))
    torch.testing.assert_close(adapted, want[:, -1], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(base, tiny_base("llama")(PROMPT).logits[:, -1], atol=1e-4, rtol=1e-5)


def test_a_magnitude_of_zero_leaves_the_bias():
    """Where DoRA's factor is 0, it cannot stand behind the sum with the bias."""
    config = LoraConfig(use_dora=True, target_modules=["q_proj"], **LORA)
    model = tiny_peft("qwen2", config)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_magnitude_vector["default"].weight.data[:3] = 0
    check_halves(model, tiny_base("qwen2"), "paired")


def test_a_wrong_name_of_a_form():
    with pytest.raises(ValueError, match="pairing must be"):
        SteeredEngine(tiny_peft(), pairing="both")


def tiny_mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=211, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        num_local_experts=4, initializer_range=0.4,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def test_lora_on_the_attention_of_a_mixture_of_experts():
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, **LORA)
    check_halves(get_peft_model(tiny_mixtral(), config).eval(), tiny_mixtral(), "paired")


def test_lora_on_experts_is_not_paired():
    config = LoraConfig(
        target_modules=[], target_parameters=["experts.gate_up_proj"], init_lora_weights=False,
        **LORA,
    )  # fmt: skip
    model = get_peft_model(tiny_mixtral(), config).eval()
    with pytest.raises(ValueError, match="experts"):
        SteeredEngine(model, pairing="paired")
    check_halves(model, tiny_mixtral(), "auto")

    class Mixture(nn.Module):
        def __init__(self, expert):
            super().__init__()
            self.experts = nn.ModuleList([expert])

        def forward(self, x):
            return self.experts[0](x)

    base = tiny_base("llama")
    base.model.layers[1].mlp = Mixture(base.model.layers[1].mlp)
    model = get_peft_model(base, LoraConfig(target_modules=["down_proj"], **LORA))
    with pytest.raises(ValueError, match=r"experts\.0\.down_proj is an expert"):
        SteeredEngine(model, pairing="paired")


def test_another_adapter_that_is_loaded_is_not_used():
    model = tiny_peft("llama")
    model.add_adapter(
        "other", LoraConfig(target_modules=["k_proj"], init_lora_weights=False, **LORA)
    )
    check_halves(model, tiny_base("llama"), "paired")
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="one active adapter"):
        SteeredEngine(model)


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


TIED = {
    "a lora on both": dict(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    "a lora on both, by both names": dict(
        target_modules=["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=True
    ),
    "a lora on the head alone": dict(target_modules=["lm_head", "q_proj"]),
    "dora on the head": dict(target_modules=["lm_head", "q_proj"], use_dora=True),
    "a saved embedding": dict(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "a saved head": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "trained tokens": dict(target_modules=["q_proj"], trainable_token_indices=[5, 17, 40]),
    "a parameter": dict(target_modules=[], target_parameters=["embed_tokens.weight"]),
}


def tiny_tied():
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS["llama"])
    config.tie_word_embeddings = True
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", TIED)
def test_adapters_on_tied_embeddings(what):
    model = get_peft_model(tiny_tied(), LoraConfig(**LORA, **TIED[what])).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
    check_halves(model, tiny_tied(), "auto")
    engine = SteeredEngine(model, steering=SteeringConfig(-2.0))
    (got,) = engine.generate([5, 17, 40], max_new_tokens=6)
    truth = teacher_forced_two_pass(model, [5, 17, 40], got.token_ids, -2.0)
    assert_same_tokens(got.token_ids, truth, tie=1e-3)


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_lora_on_parameters_of_dense_layers(architecture, saved):
    names = ["q_proj.weight", "down_proj.weight"] if architecture == "llama" else ["c_fc.weight"]
    config = LoraConfig(target_modules=[], target_parameters=names, modules_to_save=saved, **LORA)
    model, base = tiny_peft(architecture, config), tiny_base(architecture)
    before = {name: id(weight) for name, weight in model.named_parameters()}
    check_halves(model, base, "paired")
    engine = SteeredEngine(model, steering=SteeringConfig(-2.0), pairing="paired")
    (got,) = engine.generate([5, 17, 40], max_new_tokens=6)
    truth = teacher_forced_two_pass(model, [5, 17, 40], got.token_ids, -2.0)
    assert_same_tokens(got.token_ids, truth, tie=1e-3)
    assert {name: id(weight) for name, weight in model.named_parameters()} == before
