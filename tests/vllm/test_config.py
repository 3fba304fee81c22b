"""What is refused before anything loads, and what vLLM's keys of compiled code depend on."""

import json
import logging
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from svd_engine import Steering, SteeringConfig
from svd_engine.integrations.vllm import engine_args, plugin
from tests.vllm.conftest import SETTINGS


def test_the_plugin_brings_nothing_heavy_into_other_programs():
    code = (
        "import sys, svd_engine.integrations.vllm.plugin\n"
        "print(sorted({'torch', 'transformers', 'peft', 'vllm'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_a_plugin_that_cannot_register_stops_nobody(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", None)  # imports of it fail
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert "not registered with this vLLM" in caplog.text


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cpu"])
def test_a_supported_version(version):
    plugin.check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0.0"])
def test_another_version_is_refused(version):
    with pytest.raises(ValueError, match=f"vLLM {version} is not supported.*steers in 0.32"):
        plugin.check_version(version)


def configure(vllm, arguments, **options):
    return vllm.EngineArgs(**SETTINGS | arguments | options).create_engine_config()


@pytest.fixture
def arguments(folder_of, tmp_path):
    """Of a steered Llama in a folder of its own."""
    root, _ = folder_of("llama")
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    return engine_args(tmp_path / "base", tmp_path / "adapter")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("enable_lora", {"enable_lora": True}),
        ("speculative_config",
         {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}),
        ("kv_transfer_config",
         {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}),
        ("decode_context_parallel_size",
         {"tensor_parallel_size": 2, "decode_context_parallel_size": 2}),
        ("enable_prompt_embeds", {"enable_prompt_embeds": True}),
        ("load_format='dummy'", {"load_format": "dummy"}),
        ("load_format='sharded_state'", {"load_format": "sharded_state"}),
    ],
)  # fmt: skip
def test_a_feature_is_refused_by_name(vllm, arguments, name, options):
    with pytest.raises(ValueError, match=f"{name} is not supported with steering"):
        configure(vllm, arguments, **options)


def test_batch_sharded_sampling_is_refused(vllm, arguments):
    from svd_engine.integrations.vllm import config

    found = configure(vllm, arguments)
    found.parallel_config.enable_batch_sharded_sampling = True
    with pytest.raises(ValueError, match="enable_batch_sharded_sampling is not supported"):
        config.check_config(found)


def test_an_unsupported_release_is_refused(vllm, arguments, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.40.0")
    with pytest.raises(ValueError, match=r"vLLM 0\.40\.0 is not supported"):
        configure(vllm, arguments)


def test_a_steered_name_without_an_adapter_is_refused(vllm, arguments):
    arguments["hf_overrides"].pop("svd_engine")
    with pytest.raises(ValueError, match="no svd_engine object that names an adapter"):
        configure(vllm, arguments)


def test_an_attention_backend_that_counts_the_models_heads_is_refused(vllm, monkeypatch):
    from svd_engine.integrations.vllm import attention

    monkeypatch.setattr(attention.Attention, "__init__", lambda *_, **__: None)
    made = attention.Attention.__new__(attention.Attention)
    made.__dict__["attn_backend"] = type("Flex", (), {"get_name": lambda: "FLEX_ATTENTION"})
    with attention.paired(), pytest.raises(ValueError, match="backend FLEX_ATTENTION is not supp"):
        attention.Attention.__init__(made, 4, 32, 1.0, 2)


def test_compiled_code_is_kept_for_one_adapter(vllm, arguments, folder_of):
    """Another adapter at the same place, even of the same shape, is another model."""
    first = configure(vllm, arguments).compute_hash()
    assert configure(vllm, arguments).compute_hash() == first
    folder = arguments["hf_overrides"]["svd_engine"]["adapter"]
    path = f"{folder}/adapter_model.safetensors"
    with open(path, "rb") as file:
        content = bytearray(file.read())
    content[-1] ^= 1
    with open(path, "wb") as file:
        file.write(content)
    assert configure(vllm, arguments).compute_hash() != first


def test_a_steering_for_another_vocabulary_is_refused(vllm, arguments):
    folder = arguments["hf_overrides"]["svd_engine"]["adapter"]
    with open(f"{folder}/steering_config.json", "w") as file:
        json.dump({"strength": 1.0, "vocab_size": 5}, file)
    with pytest.raises(ValueError, match="calibrated for a vocabulary of 5"):
        configure(vllm, arguments)


def test_model_runner_v2_keeps_choices_by_slot(vllm, monkeypatch):
    """The runner of GPUs, which needs Triton, is replaced by what it tells a model's state."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    from svd_engine.integrations.vllm.model_state import SteeredModelState
    from svd_engine.integrations.vllm.steering import ADAPTED, STEERED, SteeredLogits

    def init(self, vllm_config, model, encoder_cache, device):
        self.model, self.max_num_reqs = model, 4

    monkeypatch.setattr(DefaultModelState, "__init__", init)
    monkeypatch.setattr(DefaultModelState, "add_request", lambda *_: None)
    monkeypatch.setattr(DefaultModelState, "prepare_inputs", lambda *_: {})
    steered = SteeredLogits(Steering.of(SteeringConfig(-3.0)))
    state = SteeredModelState(None, SimpleNamespace(steered=steered), None, "cpu")

    def add(slot, **extra):
        state.add_request(
            slot, SimpleNamespace(sampling_params=vllm.SamplingParams(extra_args=extra))
        )

    def step(*slots):
        batch = SimpleNamespace(expanded_idx_mapping=torch.tensor(slots))
        assert state.prepare_inputs(batch, None) == {}
        return steered.take()

    add(2)
    rows = step(2)
    assert rows.strength == -3.0 and rows.model is None
    add(0, strength=2.0)
    add(3, model="adapted")
    rows = step(3, 0, 2)
    assert rows.strength[1:].tolist() == [2.0, -3.0]
    assert rows.model.tolist() == [ADAPTED, STEERED, STEERED]
    add(3)  # the slots are given to others
    add(0)
    rows = step(0, 3)
    assert rows.strength == -3.0 and rows.model is None
