"""PEFT models read into an `Adapter`, which holds all that the runners are built from."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from svd_engine.model import adapter_layers

PROMPT_METHODS = (PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.PREFIX_TUNING)

Prefix = list[tuple[Tensor, Tensor]]  # keys and values [kv_heads, P, head_dim] per layer
PeftModules = list[tuple[str, Any]]  # names and modules that PEFT put into the base model


@dataclass(frozen=True, eq=False)
class Adapter:
    """The active adapter of a PEFT model and the base model under it; neither is changed.

    P is the number of virtual tokens: positions that a prompt method puts before the text.
    """

    base_model: PreTrainedModel  # with PEFT's layers in it
    name: str
    layers: tuple[BaseTunerLayer, ...]  # the adapted layers
    wrappers: tuple[AuxiliaryTrainingWrapper, ...]  # around modules that PEFT replaces as a whole
    reason_not_paired: str | None  # why the two models cannot share one batch; None if they can
    virtual_tokens: int = 0  # P
    prompt_embeddings: Tensor | None = None  # [P, H], of prompt tuning and P-tuning
    prefix: Prefix | None = None  # of prefix tuning; with a sliding window, only slots in its reach

    @classmethod
    def read(cls, model: Any) -> "Adapter":
        """Read a `PeftModel`. Raise ValueError where its base model cannot be recovered."""
        if not isinstance(model, PeftModel):
            raise ValueError(f"model must be a PeftModel; got {type(model).__name__}.")
        _check_one_active(model.active_adapters)
        config, modules = model.active_peft_config, _peft_modules(model)
        adapter = cls._from_modules(model.get_base_model(), model.active_adapter, config, modules)
        return replace(adapter, **_prompt(model)) if config.is_prompt_learning else adapter

    @classmethod
    def read_injected(cls, model: PreTrainedModel) -> "Adapter":
        """Read the layers that PEFT put into `model`, with or without a `PeftModel` around it.

        Raise ValueError where there are none or the base model cannot be recovered.
        """
        modules = _peft_modules(model)
        layers = [module for _, module in modules if isinstance(module, BaseTunerLayer)]
        if not layers:
            raise ValueError(
                f"model must be a PeftModel; got {type(model).__name__} without an adapter. Load "
                "one with PeftModel.from_pretrained(model, adapter)."
            )
        for layer in layers:
            for hook in layer._forward_pre_hooks.values():  # type: ignore[attr-defined]
                names = getattr(hook, "keywords", {}).keys() & {"adapter_names", "alora_offsets"}
                for name in names:
                    raise ValueError(
                        f"{name} is not supported; choose with model.set_adapter(name)."
                    )
        active = sorted({name for layer in layers for name in layer.active_adapters})
        _check_one_active(active)
        return cls._from_modules(model, active[0], model.peft_config[active[0]], modules)

    @classmethod
    def _from_modules(
        cls, base_model: Any, name: str, config: Any, modules: PeftModules
    ) -> "Adapter":
        _check_recoverable(config, modules)
        return cls(
            base_model,
            name,
            layers=tuple(m for _, m in modules if isinstance(m, BaseTunerLayer)),
            wrappers=tuple(m for _, m in modules if isinstance(m, AuxiliaryTrainingWrapper)),
            reason_not_paired=_reason_not_paired(config.peft_type, modules),
        )


def _peft_modules(root: nn.Module) -> PeftModules:
    """Walk the tree of modules: the only walk that reading takes."""
    kinds = BaseTunerLayer, AuxiliaryTrainingWrapper
    return [(name, module) for name, module in root.named_modules() if isinstance(module, kinds)]


def _check_one_active(adapters: list[str]) -> None:
    if len(adapters) != 1:
        raise ValueError(
            f"model must have one active adapter; got {adapters}. "
            "Choose with model.set_adapter(name)."
        )


def _check_recoverable(config: Any, modules: PeftModules) -> None:
    """Raise ValueError where the base model cannot be recovered from the PEFT model."""
    if config.is_prompt_learning and config.peft_type not in PROMPT_METHODS:
        known = ", ".join(method.value for method in PROMPT_METHODS)
        raise ValueError(f"model uses {config.peft_type.value}; of its kind {known} are supported.")
    if (bias := getattr(config, "bias", "none")) != "none":
        raise ValueError(
            f"model was trained with bias={bias!r}, which changes the base model's own "
            "biases, so the base model is gone. Train with bias='none'."
        )
    for name, module in modules:
        if isinstance(module, BaseTunerLayer) and (module.merged or module.disable_adapters):
            state, remedy = (
                ("merged", "unmerge_adapter()")
                if module.merged
                else ("disabled", "base_model.enable_adapter_layers()")
            )
            raise ValueError(f"model has a {state} adapter in {name}. Call {remedy} first.")


def _reason_not_paired(method: PeftType, modules: PeftModules) -> str | None:
    if method not in (PeftType.LORA, PeftType.IA3, *PROMPT_METHODS):
        return f"{method.value} has no paired form"
    for name, module in modules:
        if not isinstance(module, BaseTunerLayer):
            return f"{name} is replaced as a whole"
        if "experts" in name.split("."):
            return f"{name} is an expert, which sees the tokens routed to it and not whole halves"
        if reason := adapter_layers.why_not(module):
            return f"{name} {reason}"
    return None


@torch.no_grad()
def _prompt(model: PeftModel) -> dict[str, Any]:
    """Return the fields of an adapter that only the prompt methods have."""
    config, prompt = model.active_peft_config, model.get_prompt(batch_size=1)
    fields: dict[str, Any] = {"virtual_tokens": config.num_virtual_tokens}
    if config.peft_type != PeftType.PREFIX_TUNING:
        return fields | {"prompt_embeddings": prompt[0]}
    cache: Cache = prompt  # type: ignore[assignment]
    return fields | {"prefix": [(layer.keys[0], layer.values[0]) for layer in cache.layers]}  # type: ignore


def load(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """Load the adapter in a folder or Hub repository on top of `model`."""
    config = PeftConfig.from_pretrained(str(folder))
    return PeftModel.from_pretrained(model, str(folder), config=config).eval()
