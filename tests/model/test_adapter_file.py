"""Adapters in a folder: whole and of this base, or refused by what is wrong."""

import json

import pytest
import torch
from peft import LoraConfig, VeraConfig
from safetensors.torch import load_file, save_file

from svd_engine import SteeredEngine, loading
from tests.tiny import tiny_base, tiny_peft

FILE = "adapter_model.safetensors"
PROMPT = torch.tensor([[5, 17, 40, 9, 33, 101]])
LORA = dict(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


def saved(folder, config=None, change=None, **options):
    model = tiny_peft("llama", config)
    model.save_pretrained(folder, **options)
    if change is not None:
        save_file(change(load_file(folder / FILE)), folder / FILE)
    return model


def check_pair(peft_model, model, base=None):
    pair = SteeredEngine(peft_model).pair
    rows = pair.logits(pair.prefill(PROMPT.tolist()))
    for row, whole in zip(rows, (model, base or tiny_base("llama")), strict=True):
        torch.testing.assert_close(row, whole(PROMPT).logits[:, -1], atol=1e-4, rtol=1e-5)


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if name not in k}


def elsewhere(tensors):
    return {k.replace("q_proj", "k_proj"): v.clone() for k, v in tensors.items()}


FAULTS = {
    f"1 of its 12 tensors are missing: {FIRST}": without(FIRST),
    "6 of its 12 tensors are missing": without("lora_B"),
    "12 of its 12 tensors are missing": lambda _: {"unrelated": torch.ones(3)},
    "1 of its tensors are unknown: unrelated": lambda x: x | {"unrelated": torch.ones(3)},
    r"4 of its tensors are unknown: .*k_proj.*, \.\.\.\. Save": lambda x: x | elsewhere(x),
    r"4 of its 12 .* missing: .*q_proj.*; 4 of its tensors are unknown: .*k_proj": elsewhere,
}


@pytest.mark.parametrize("what", FAULTS)
def test_half_an_adapter_is_refused(what, tmp_path):
    saved(tmp_path, change=FAULTS[what])
    with pytest.raises(ValueError, match=what):
        loading.load_adapter(tiny_base("llama"), tmp_path)


def test_a_saved_module_that_is_missing_is_refused(tmp_path):
    config = LoraConfig(modules_to_save=["lm_head"], **LORA)
    saved(tmp_path, config, change=without("lm_head.weight"))
    with pytest.raises(ValueError, match=r"its tensor .*lm_head.weight' is missing"):
        loading.load_adapter(tiny_base("llama"), tmp_path)


@torch.no_grad()
def test_a_saved_module_differs_from_the_base(tmp_path):
    model = saved(tmp_path, LoraConfig(modules_to_save=["lm_head"], **LORA))
    check_pair(loading.load_adapter(tiny_base("llama"), tmp_path), model)


@torch.no_grad()
def test_embeddings_saved_beside_an_adapter_must_be_those_of_the_base(tmp_path):
    config = LoraConfig(**LORA | dict(target_modules=["embed_tokens", "q_proj"]))
    model = saved(tmp_path, config)  # PEFT adds the embeddings because they are targeted
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(tmp_path / FILE)
    check_pair(loading.load_adapter(tiny_base("llama"), tmp_path), model)
    with pytest.raises(ValueError, match=r"weights of another base model: .*embed_tokens"):
        loading.load_adapter(tiny_base("llama", seed=3), tmp_path)


@torch.no_grad()
def test_projections_that_are_not_saved_are_made_again(tmp_path):
    config = VeraConfig(
        r=8, target_modules=["q_proj", "v_proj"], save_projection=False, task_type="CAUSAL_LM"
    )
    model = saved(tmp_path, config)
    check_pair(loading.load_adapter(tiny_base("llama"), tmp_path), model)


def test_a_method_that_is_refused_is_not_said_to_misfit(tmp_path):
    saved(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alora_invocation_tokens": [7]}))
    with pytest.raises(ValueError, match=r"^adapter .* has alora_invocation_tokens"):
        loading.load_adapter(tiny_base("llama"), tmp_path)


def test_a_configuration_that_cannot_be_read(tmp_path):
    saved(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "NEWEST"}')
    with pytest.raises(ValueError, match=r"^adapter .* cannot be loaded"):
        loading.load_adapter(tiny_base("llama"), tmp_path)
