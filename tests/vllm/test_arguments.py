"""Engine arguments and exported folders, which are made without vLLM."""

import json

import pytest
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors import safe_open

from svd_engine import Steering, SteeringConfig
from svd_engine.integrations.vllm import arguments, engine_args
from tests.tiny import tiny_base, tiny_peft


def test_engine_args(tiny_folder):
    base, adapter = tiny_folder / "base", tiny_folder / "adapter"
    found = engine_args(
        base, adapter, steering=SteeringConfig(-2.0), max_model_len=64, hf_overrides={"x": 1}
    )
    assert found["model"] == str(base) and found["max_model_len"] == 64
    assert found["hf_overrides"]["x"] == 1
    assert found["hf_overrides"]["architectures"] == ["SteeredLlamaForCausalLM"]
    values = json.loads(json.dumps(found["hf_overrides"]["svd_engine"]))  # as a process gets it
    assert values["adapter"] == str(adapter.resolve())
    assert arguments.steering_of(values, adapter) == Steering.of(SteeringConfig(-2.0))


def test_the_steering_beside_the_adapter(tmp_path):
    assert arguments.steering_of({}, tmp_path) == Steering()
    steering = Steering(SteeringConfig(-1.0), SteeringConfig(2.0, alpha=0.2))
    steering.save_pretrained(tmp_path)
    assert arguments.steering_of({}, tmp_path) == steering


def test_no_adapter():
    with pytest.raises(ValueError, match="adapter is missing"):
        engine_args("base")


def test_an_architecture_that_is_not_known(tiny_folder, tmp_path):
    tiny_base("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="GPT2LMHeadModel cannot be steered in vLLM"):
        engine_args(tmp_path, tiny_folder / "adapter")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "uses PROMPT_TUNING"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "modules_to_save"),
    ],
)
def test_an_adapter_that_is_no_change_to_layers(tiny_folder, tmp_path, config, message):
    get_peft_model(tiny_base("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        engine_args(tiny_folder / "base", tmp_path)


def export(run, *arguments):
    return run("export", *arguments, "--for", "vllm")


def test_export(run, tiny_folder, tmp_path):
    """Base by links, adapter by copies, and a configuration that names both."""
    folder = tmp_path / "out"
    code, out, _ = export(
        run, folder, "--adapter", tiny_folder / "adapter", "--base", tiny_folder / "base",
        "--strength", "-3", "--alpha", "0.2",
    )  # fmt: skip
    assert code == 0 and f"vllm serve {folder}" in out
    config = json.loads((folder / "config.json").read_text())
    base = json.loads((tiny_folder / "base" / "config.json").read_text())
    assert config == base | {
        "architectures": ["SteeredLlamaForCausalLM"], "svd_engine": {"adapter": "adapter"},
    }  # fmt: skip
    weights = folder / "model.safetensors"
    assert weights.is_symlink() and weights.resolve().parent == (tiny_folder / "base").resolve()
    assert (folder / "tokenizer_config.json").is_file()
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert len(file.keys()) == len(
            [n for n, p in tiny_peft("llama").named_parameters() if p.requires_grad]
        )
    kept = arguments.steering_of(config["svd_engine"], folder / "adapter")
    assert kept.generation == SteeringConfig(-3.0, alpha=0.2) and kept.ranking is None


def test_export_copies(run, tiny_folder, tmp_path):
    code, _, _ = export(
        run, tmp_path / "out", "--adapter", tiny_folder / "adapter", "--base",
        tiny_folder / "base", "--strength", "-3", "--copy",
    )  # fmt: skip
    assert code == 0 and not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_export_writes_nothing_where_it_fails(run, tiny_folder, tmp_path):
    both = "--adapter", tiny_folder / "adapter", "--base", tiny_folder / "base"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    code, _, err = export(run, tmp_path / "full", *both, "--strength", "-3")
    assert code == 2 and "is not an empty folder" in err
    code, _, err = export(run, tmp_path / "new", *both)
    assert code == 2 and "give --strength" in err
    tiny_base("gpt2").save_pretrained(tmp_path / "gpt2")
    code, _, err = export(
        run, tmp_path / "new", "--adapter", tiny_folder / "adapter", "--base", tmp_path / "gpt2",
        "--strength", "-3",
    )  # fmt: skip
    assert code == 2 and "cannot be steered in vLLM" in err
    assert {path.name for path in tmp_path.iterdir()} == {"full", "gpt2"}
