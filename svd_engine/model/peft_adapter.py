"""From one PEFT model to the modules that decode: the pair, the base, the adapted model.

Each is a second tree of modules over the same parameters: the PEFT model is left as it was found.
"""

import torch
from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from svd_engine.model import adapter_layers
from svd_engine.model.layers import attention
from svd_engine.model.module_tree import Replace, clone_sharing_parameters

PROMPT_METHODS = (PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.PREFIX_TUNING)


def paired(model: PeftModel) -> PreTrainedModel:
    """Rows [base_1..base_B, adapted_1..adapted_B] through each weight once; needs `why_not_paired`
    to be None."""
    return _with_attention(
        clone_sharing_parameters(model.get_base_model(), _replace_adapted(model, paired=True))
    )


def adapted(model: PeftModel) -> PreTrainedModel:
    """The adapted model alone, without the virtual tokens of the prompt methods."""
    replace = (
        _replace_adapted(model, paired=False)
        if why_not_paired(model) is None
        else lambda module: None
    )
    return _with_attention(clone_sharing_parameters(model.get_base_model(), replace))


def base(model: PeftModel) -> PreTrainedModel:
    """The pre-trained model under the adapter."""

    def replace(module: nn.Module) -> nn.Module | None:
        if isinstance(module, BaseTunerLayer):
            return module.get_base_layer()
        if isinstance(module, AuxiliaryTrainingWrapper):
            return module.original_module
        return None

    return _with_attention(clone_sharing_parameters(model.get_base_model(), replace))


def check_recoverable(model: PeftModel) -> None:
    """Raise ValueError where the base model cannot be had back from the PEFT model."""
    if len(model.active_adapters) != 1:
        raise ValueError(
            f"model must have one active adapter; got {model.active_adapters}. "
            "Choose with model.set_adapter(name)."
        )
    config = model.active_peft_config
    if config.is_prompt_learning and config.peft_type not in PROMPT_METHODS:
        known = ", ".join(method.value for method in PROMPT_METHODS)
        raise ValueError(f"model uses {config.peft_type.value}; of its kind {known} are supported.")
    if getattr(config, "bias", "none") != "none":
        raise ValueError(
            f"model was trained with bias={config.bias!r}, which changes the base model's own "
            "biases, so the base model is gone. Train with bias='none'."
        )
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and (module.merged or module.disable_adapters):
            state, remedy = (
                ("merged", "unmerge_adapter()")
                if module.merged
                else ("disabled", "base_model.enable_adapter_layers()")
            )
            raise ValueError(f"model has a {state} adapter in {name}. Call {remedy} first.")


def why_not_paired(model: PeftModel) -> str | None:
    """Why the two models cannot share one batch; None where they can."""
    method = model.active_peft_config.peft_type
    if method not in (PeftType.LORA, PeftType.IA3, *PROMPT_METHODS):
        return f"{method.value} has no paired form"
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return f"{name} is replaced as a whole"
        if not isinstance(module, BaseTunerLayer):
            continue
        if "experts" in name.split("."):
            return f"{name} is an expert, which sees the tokens routed to it and not whole halves"
        if reason := adapter_layers.why_not(module):
            return f"{name} {reason}"
    return None


def _replace_adapted(model: PeftModel, paired: bool) -> Replace:
    def replace(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, BaseTunerLayer):
            return None
        return adapter_layers.paired_layer(module, model.active_adapter, paired)

    return replace


def _with_attention(model: nn.Module) -> PreTrainedModel:
    assert isinstance(model, PreTrainedModel)
    model.set_attn_implementation(attention.NAME)
    return model


def virtual_tokens(model: PeftModel) -> int:
    """Positions that a prompt method puts before the text; 0 for other methods."""
    config = model.active_peft_config
    return config.num_virtual_tokens if config.is_prompt_learning else 0


@torch.no_grad()
def prompt_embeddings(model: PeftModel) -> Tensor | None:
    """`[virtual_tokens, H]` of prompt tuning and P-tuning; None for other methods."""
    if model.active_peft_config.peft_type not in (PeftType.PROMPT_TUNING, PeftType.P_TUNING):
        return None
    return model.get_prompt(batch_size=1)[0]


@torch.no_grad()
def prefix(model: PeftModel) -> list[tuple[Tensor, Tensor]] | None:
    """Keys and values `[kv_heads, P, head_dim]` a layer of prefix tuning, or None.

    P is the number of virtual tokens; of a layer with a sliding window, those in its reach."""
    if model.active_peft_config.peft_type != PeftType.PREFIX_TUNING:
        return None
    cache: Cache = model.get_prompt(batch_size=1)  # type: ignore[assignment]
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]  # type: ignore
