"""Tiny models whose heads vLLM's CPU kernels can take, adapters for them, and plain answers."""

import copy
import json
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from svd_engine.steering_config import Steering, SteeringConfig

VOCAB = 211
STEERING = Steering(SteeringConfig(-3.0, alpha=0.01), SteeringConfig(-2.0, alpha=0.05))
_SMALL = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
    bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2,
)  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SMALL),
    "mistral": MistralConfig(**_SMALL, sliding_window=16),
    "qwen2": Qwen2Config(**{**_SMALL, "hidden_size": 128}),
    "qwen3": Qwen3Config(**_SMALL),
    "gemma2": Gemma2Config(**_SMALL, sliding_window=16, query_pre_attn_scalar=32),
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_PATTERNS = LoraConfig(
    r=4, lora_alpha=8, target_modules=ALL, use_rslora=True,
    rank_pattern={"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 6},
    alpha_pattern={"up_proj": 16},
)  # fmt: skip
ADAPTERS = {
    "llama": LoraConfig(r=4, lora_alpha=8, target_modules=ALL),
    "mistral": _PATTERNS,
    "qwen2": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"]),
    "qwen3": LoraConfig(r=4, lora_alpha=8, target_modules=ALL, use_dora=True),
    "gemma2": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "all": LoraConfig(
        r=4, lora_alpha=8, target_modules=[*ALL, "embed_tokens", "lm_head"], use_dora=True
    ),
    "head": LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", "q_proj", "lm_head"]),
}


def build(architecture: str, adapter: str | None = None) -> PeftModel:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(
        copy.deepcopy(CONFIGS[architecture]), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if architecture == "gemma2":  # or its embeddings would decide alone, being those of its head
        base.model.embed_tokens.weight.data *= 0.1
        base.model.norm.weight.data += 20
    config = copy.deepcopy(ADAPTERS[adapter or architecture])
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(base, config).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
        elif parameter.requires_grad:
            shift, spread = (1.0, 0.5) if "ia3" in name else (0.0, 0.2)
            parameter.data = shift + spread * torch.randn_like(parameter)
    return model


def save(model: PeftModel, folder: Path) -> None:
    """Write the base, and the adapter with a steering beside it."""
    model.get_base_model().config.save_pretrained(folder / "base")
    with model.disable_adapter():
        plain = {
            name.replace(".base_layer", ""): x
            for name, x in model.get_base_model().state_dict().items()
            if not any(part in name for part in ("lora_", "ia3_"))
        }
    base = AutoModelForCausalLM.from_config(model.get_base_model().config, dtype=torch.float32)
    base.load_state_dict(plain)
    base.save_pretrained(folder / "base")
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    STEERING.save_pretrained(folder / "adapter")


def quantise(folder: Path) -> None:
    """Round the layers of a saved base to 8 bits; its inputs are rounded with each call."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        scale = tensors[name].abs().amax(1, keepdim=True) / 127
        tensors[name] = (tensors[name] / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    weights = dict(num_bits=8, type="int", symmetric=True, strategy="channel", dynamic=False)
    inputs = weights | dict(strategy="token", dynamic=True)
    group = dict(targets=["Linear"], weights=weights, input_activations=inputs)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = dict(
        quant_method="compressed-tensors", format="int-quantized", quantization_status="compressed",
        config_groups={"group_0": group}, ignore=["lm_head"],
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
