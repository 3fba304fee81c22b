"""Tiny random models, and the plain two-pass loop that the engine must equal."""

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from svd_engine.kernels import reference

VOCAB = 211
PROMPTS = [[5, 17, 40, 9, 33], [101], [7, 7, 120, 3, 88, 61, 14, 90, 55], [200, 4]]
_SMALL = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.4,
)  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SMALL),
    "qwen2": Qwen2Config(**_SMALL),
    "qwen3": Qwen3Config(**_SMALL, head_dim=16),
    "mistral": MistralConfig(**_SMALL, sliding_window=8),
    "gemma2": Gemma2Config(
        **_SMALL, head_dim=8, sliding_window=8, query_pre_attn_scalar=8, tie_word_embeddings=False
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1,
        eos_token_id=2, initializer_range=0.4,
    ),
}  # fmt: skip


def tiny_base(architecture: str, seed: int = 0):
    torch.manual_seed(seed)
    # Older transformers drop Gemma 2's soft cap in their default attention.
    return AutoModelForCausalLM.from_config(
        copy.deepcopy(CONFIGS[architecture]), dtype=torch.float32, attn_implementation="eager"
    ).eval()


def tiny_peft(architecture: str = "llama", config=None) -> PeftModel:
    """A random adapter that changes the model visibly."""
    targets = ["c_attn", "c_fc"] if architecture == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    config = config or LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=architecture == "gpt2",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(tiny_base(architecture), config).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shift = 1.0 if "ia3" in name else 0.0
            parameter.data = shift + 0.2 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def two_pass(
    model: PeftModel, prompt: list[int], new: int, strength: float, alpha: float = 0.1,
    end: int | None = 2,
) -> list[tuple[int, float]]:  # fmt: skip
    """Plain PEFT, adapter on and then off, no cache: (token, gap to the runner-up) a step."""
    ids, drawn = list(prompt), []
    for _ in range(new):
        row = torch.tensor([ids])
        adapted = model(row).logits[:, -1]
        with model.disable_adapter():
            base = model(row).logits[:, -1]
        steered = reference.steer(adapted.float(), base.float(), strength, alpha=alpha)
        best = steered[0].topk(2)
        drawn.append((int(steered.argmax()), float(best.values[0] - best.values[1])))
        ids.append(drawn[-1][0])
        if ids[-1] == end:
            break
    return drawn


@torch.no_grad()
def teacher_forced_two_pass(
    model: PeftModel, prompt: list[int], tokens: list[int], strength: float, alpha: float = 0.1
) -> list[tuple[int, float]]:
    """`two_pass` in two forward passes: each step's answer given that the ones before are `tokens`.

    A causal model's answers to the whole sequence are its answers to every beginning of it.
    """
    row = torch.tensor([prompt + tokens[:-1]])
    adapted = model(row).logits[0, -len(tokens) :]  # those of virtual tokens come before
    with model.disable_adapter():
        base = model(row).logits[0, -len(tokens) :]
    best = reference.steer(adapted.float(), base.float(), strength, alpha=alpha).topk(2)
    gaps = best.values[:, 0] - best.values[:, 1]
    return list(zip(best.indices[:, 0].tolist(), gaps.tolist(), strict=True))


def assert_same_tokens(got: list[int], truth: list[tuple[int, float]], tie: float) -> None:
    """Equal up to the first step whose two best steered logits are closer than `tie`."""
    for step, (token, gap) in enumerate(truth):
        if step < len(got) and got[step] == token:
            continue
        assert gap < tie, f"step {step}: {got} against {truth}"
        return
    assert len(got) == len(truth)
