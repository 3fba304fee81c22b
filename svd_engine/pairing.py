"""From one PEFT model to the modules that decode: the pair, the base, the adapted model.

Each is a second tree of modules over the same parameters: the PEFT model is left as it was found.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig, PreTrainedModel

from svd_engine import attention

PROMPT_METHODS = (PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.PREFIX_TUNING)
Replace = Callable[[nn.Module], nn.Module | None]


class LeanLora(nn.Module):
    """W x for every row, plus scale * B (A x) for every row or for the second half of the rows."""

    base_layer: nn.Module
    down: Tensor  # A, [r, in]
    up: Tensor  # scale * B, [out, r]
    up_bias: Tensor | None

    def __init__(self, layer: LoraLinear, adapter: str, paired: bool) -> None:
        super().__init__()
        self.paired = paired
        up: nn.Linear = layer.lora_B[adapter]  # type: ignore[assignment]
        scale = layer.scaling[adapter]
        self.base_layer = layer.get_base_layer()
        self.down = layer.lora_A[adapter].weight  # type: ignore[assignment]
        self.up = up.weight.detach() * scale
        self.up_bias = None if up.bias is None else up.bias.detach() * scale

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        first = x.shape[0] // 2 if self.paired else 0
        low = nn.functional.linear(x[first:].to(self.down.dtype), self.down)
        out[first:] += nn.functional.linear(low, self.up, self.up_bias)
        return out


def paired(model: PeftModel) -> PreTrainedModel:
    """Rows [base_1..base_B, adapted_1..adapted_B] through each weight once; needs `why_not_paired`
    to be None."""
    return _with_attention(_share(model.get_base_model(), _lean(model, paired=True)))


def adapted(model: PeftModel) -> PreTrainedModel:
    """The adapted model alone, without the virtual tokens of the prompt methods."""
    lean = _lean(model, paired=False) if why_not_paired(model) is None else lambda module: None
    return _with_attention(_share(model.get_base_model(), lean))


def base(model: PeftModel) -> PreTrainedModel:
    """The pre-trained model under the adapter."""

    def replace(module: nn.Module) -> nn.Module | None:
        if isinstance(module, BaseTunerLayer):
            return module.get_base_layer()
        if isinstance(module, AuxiliaryTrainingWrapper):
            return module.original_module
        return None

    return _with_attention(_share(model.get_base_model(), replace))


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
    config = model.active_peft_config
    if config.peft_type != PeftType.LORA:
        return f"{config.peft_type.value} has no paired form"
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return f"{name} is replaced as a whole"
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, LoraLinear):
            return f"{name} is an adapted {type(module.get_base_layer()).__name__}"
        if module.lora_variant:
            return f"{name} uses {type(next(iter(module.lora_variant.values()))).__name__}"
    return None


def _lean(model: PeftModel, paired: bool) -> Replace:
    adapter = model.active_adapter

    def replace(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, LoraLinear):
            return None
        if adapter not in module.lora_A:
            return module.get_base_layer()
        return LeanLora(module, adapter, paired)

    return replace


def _share(root: nn.Module, replace: Replace) -> nn.Module:
    """A tree like `root` over the same parameters, with some modules replaced."""
    configs: dict[int, PretrainedConfig] = {}
    twins: dict[int, nn.Module] = {}  # by the module found in the tree, which stays alive

    def visit(found: nn.Module) -> nn.Module:
        if id(found) in twins:
            return twins[id(found)]
        module = replace(found) or found
        twin = twins[id(found)] = copy.copy(module)
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            setattr(twin, hooks, OrderedDict(getattr(module, hooks)))
        twin._modules = {
            name: None if child is None else visit(child) for name, child in module._modules.items()
        }
        if isinstance(config := getattr(module, "config", None), PretrainedConfig):
            twin.config = configs.setdefault(id(config), copy.deepcopy(config))  # type: ignore
        return twin

    return visit(root).eval()


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
    """Keys and values `[kv_heads, virtual_tokens, head_dim]` a layer of prefix tuning, or None."""
    if model.active_peft_config.peft_type != PeftType.PREFIX_TUNING:
        return None
    cache: Cache = model.get_prompt(batch_size=1)  # type: ignore[assignment]
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]  # type: ignore
