"""Measure a decode step by PEFT method, beside LoRA: both models as one batch, and in two passes.

    python -m benchmarks.run --only cpu_methods

The contenders take turns of a few tokens each. CPU time counts, which other programs hardly change.
"""

from collections.abc import Callable
from statistics import median
from time import process_time
from typing import Any

import peft
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.engine.contenders import random_adapter
from benchmarks.records import machine
from svd_engine import loading
from svd_engine.model.pair import ModelPair, pair_models
from svd_engine.model.peft_adapter import Adapter

ROUNDS, TOKENS, CONTEXT = 5, 2, 64
TINY = LlamaConfig(
    vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS: dict[str, Any] = dict(target_modules=LINEAR, task_type="CAUSAL_LM")
LORA: dict[str, Any] = dict(r=8, **LAYERS)
METHODS: dict[str, Callable[[], peft.PeftConfig]] = {
    "LoRA": lambda: peft.LoraConfig(**LORA),
    "DoRA": lambda: peft.LoraConfig(use_dora=True, **LORA),
    "AdaLoRA": lambda: peft.AdaLoraConfig(total_step=10, **LAYERS),
    "VeRA": lambda: peft.VeraConfig(
        r=64, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"
    ),
    "VB-LoRA": lambda: peft.VBLoRAConfig(vector_length=32, num_vectors=64, **LAYERS),
    "LoRA, a saved head": lambda: peft.LoraConfig(modules_to_save=["lm_head"], **LORA),
    "LoRA, trained tokens": lambda: peft.LoraConfig(trainable_token_indices=[5, 7], **LORA),
    "LN tuning": lambda: peft.LNTuningConfig(
        target_modules=["input_layernorm", "norm"], task_type="CAUSAL_LM"
    ),
    "LoHa": lambda: peft.LoHaConfig(**LORA),
    "LoKr": lambda: peft.LoKrConfig(**LORA),
    "OFT": lambda: peft.OFTConfig(oft_block_size=16, **LAYERS),
    "HRA": lambda: peft.HRAConfig(**LORA),
    "SHiRA": lambda: peft.ShiraConfig(**LORA),
    "RoAd": lambda: peft.RoadConfig(group_size=32, **LAYERS),
}


def base_model(name: str) -> PreTrainedModel:
    if name == "SmolLM2-135M":
        return loading.load_base(loading.SMOLLM2, dtype=torch.float32)[0]
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(TINY, dtype=torch.float32)
    return model


def decoder(pair: ModelPair) -> Callable[[], float]:
    """Return what decodes some tokens and returns the seconds of one."""
    pair.prefill([[1] * CONTEXT], max_new_tokens=(ROUNDS + 1) * TOKENS)
    token = torch.tensor([5])

    def decode() -> float:
        start = process_time()
        for _ in range(TOKENS):
            pair.step(token)
        return (process_time() - start) / TOKENS

    return decode


@pytest.mark.parametrize("method", list(METHODS)[1:])
@pytest.mark.parametrize("name", ["tiny", "SmolLM2-135M"])
def test_methods(benchmark: BenchmarkFixture, name: str, method: str) -> None:
    calls: dict[str, Callable[[], float]] = {}
    for contender in ("LoRA", method):
        adapter = Adapter.read(random_adapter(base_model(name), METHODS[contender]()))
        calls[f"{contender}, paired"] = decoder(pair_models(adapter, "paired"))
        if contender == method:
            calls[f"{contender}, two passes"] = decoder(pair_models(adapter, "sequential"))
    measured: dict[str, list[float]] = {key: [] for key in calls}

    def one_round() -> None:
        for key, call in calls.items():
            measured[key].append(call())

    one_round()
    measured = {key: [] for key in calls}
    benchmark.pedantic(one_round, rounds=ROUNDS)
    benchmark.extra_info |= {"machine": machine(), "model": name, "method": method}
    benchmark.extra_info["contenders"] = {
        key: {"median": median(times), "min": min(times)} for key, times in measured.items()
    }
