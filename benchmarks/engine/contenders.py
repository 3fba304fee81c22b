"""Ways to decode one model: the engine's own, Hugging Face's, and the naive steered loop.

A contender takes prompts of equal length as token ids and the number of new tokens, decodes
greedily without an end of sequence, and returns the new tokens of the first prompt.
"""

from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks.baselines import eager
from svd_engine.engine import SteeredEngine

Prompts = list[list[int]]
TEXT = (
    "The capital of France is Paris. It lies on the river Seine, and it is known for its museums, "
    "its bridges and its food. A visitor with three days should"
)
STD = 0.03  # of a random adapter: moves the model, and leaves its text alone


@torch.inference_mode()
def naive(model: PeftModel, prompts: Prompts, new: int) -> list[int]:
    """Decode with the adapter on, the adapter off, and the paper's formula over the vocabulary."""
    prefix = model.active_peft_config.is_prompt_learning
    caches = model.get_prompt(len(prompts)) if prefix else DynamicCache(), DynamicCache()
    with_adapter: Any = model.get_base_model() if prefix else model
    ids, tokens = torch.tensor(prompts, device=model.device), []
    for _ in range(new):
        adapted: Tensor = with_adapter(input_ids=ids, past_key_values=caches[0]).logits[:, -1]
        with model.disable_adapter():
            base: Tensor = model(input_ids=ids, past_key_values=caches[1]).logits[:, -1]
        ids = eager(adapted, base).argmax(-1, keepdim=True)
        tokens.append(int(ids[0].item()))
    return tokens


def hugging_face(
    model: PreTrainedModel | PeftModel, prompts: Prompts, new: int, **options: Any
) -> list[int]:
    """Decode with transformers' `generate`, un-steered."""
    ids = torch.tensor(prompts, device=model.device)
    options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False}
    decode: Any = model.generate
    out: Tensor = decode(input_ids=ids, max_new_tokens=new, **options)
    return out[0, ids.shape[1] :].tolist()


def generate(engine: SteeredEngine, prompts: Prompts, new: int, **options: Any) -> list[int]:
    """Decode with the engine, which has read nothing before. Prompts may differ in length."""
    engine.prefix_cache.clear()
    return engine.generate(prompts, max_new_tokens=new, eos_token_id=[], **options)[0].token_ids


def random_lora() -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def random_adapter(base: PreTrainedModel, config: PeftConfig, std: float = STD) -> PeftModel:
    """Add an adapter with random weights of this standard deviation, the same at every call."""
    torch.manual_seed(0)
    model = get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "prompt_encoder" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


def differ(
    engine: SteeredEngine, prompt: list[int], got: list[int], want: list[int], **options: Any
) -> str | None:
    """Describe where two completions part; None if nowhere or at two equally likely tokens."""
    step = next((i for i, (g, w) in enumerate(zip(got, want, strict=True)) if g != w), None)
    if step is None:
        return None
    ends = [[got[step]], [want[step]]]
    scores = engine.score(prompt + want[:step], ends, **options)
    if abs(scores[0] - scores[1]) < 1e-3:
        return None
    return f"step {step}: tokens {ends} with log-probabilities {scores}"
