"""Adapters read over a model without weights, against those read over the whole model."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from svd_engine.integrations.vllm.terms import AdapterTerms
from svd_engine.model import adapter_terms
from svd_engine.model.shared_state import is_put
from tests.tiny import tiny_base
from tests.vllm import models


def tensors(terms):
    """Every tensor of a layer's terms, by a name."""
    if hasattr(terms, "down"):
        return {"down": terms.down, "up": terms.up, "scale": terms.output_scale}
    parts = dict(enumerate(terms.low_rank or ()))
    return parts | {"in": terms.input_scale, "out": terms.output_scale}


@pytest.mark.parametrize(
    ("architecture", "adapter"),
    [*((name, name) for name in models.CONFIGS), ("llama", "head"), ("gemma2", "head")],
)
def test_terms(architecture, adapter, tmp_path):
    model = models.build(architecture, adapter)
    models.save(model, tmp_path)
    base = model.get_base_model()
    read = AdapterTerms(base.config, tmp_path / "adapter")
    waits = architecture == "qwen3"  # DoRA, which needs the weights of the base
    assert read.needs_weights == waits
    with model.disable_adapter():
        weights = {n.replace(".base_layer", ""): x for n, x in base.state_dict().items()}
    assert len(list(read.watch(weights.items()))) == len(weights)
    put = {name: layer for name, layer in base.named_modules() if is_put(layer)}
    assert read.found.keys() == put.keys()
    for name, layer in put.items():
        want = tensors(adapter_terms.reduced(layer, "default"))
        got = tensors(read.found[name])
        assert got.keys() == want.keys()
        for part, tensor in want.items():
            if tensor is None:
                assert got[part] is None
            else:
                torch.testing.assert_close(got[part], tensor)


def test_dora_without_the_weights_of_its_base(tmp_path):
    model = models.build("qwen3")
    models.save(model, tmp_path)
    read = AdapterTerms(model.get_base_model().config, tmp_path / "adapter")
    with pytest.raises(ValueError, match="which its DoRA needs"):
        list(read.watch([]))


def test_an_adapter_of_another_base(tmp_path):
    models.save(models.build("qwen2"), tmp_path)
    with pytest.raises(ValueError, match="does not fit the base"):
        AdapterTerms(models.CONFIGS["llama"], tmp_path / "adapter")


def test_a_base_that_was_trained_too_is_refused(tmp_path):
    config = LoraConfig(target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM")
    get_peft_model(tiny_base("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bias='all'"):
        AdapterTerms(tiny_base("llama").config, tmp_path)
