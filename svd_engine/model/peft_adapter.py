"""PEFT models read into an `Adapter`, which holds all that the runners are built from."""

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from svd_engine.model import adapter_terms, peft_methods
from svd_engine.model.adapter_layers import goes_row_by_row
from svd_engine.model.shared_state import UNDER, Modules, SharedState, is_put
from svd_engine.model.shortened import shortened

Prefix = list[tuple[Tensor, Tensor]]  # keys and values [kv_heads, P, head_dim] per layer


@dataclass(frozen=True, eq=False)
class Adapter:
    """The active adapter of a PEFT model and the base model under it; neither is changed.

    P is the number of virtual tokens: positions that a prompt method puts before the text.
    """

    base_model: PreTrainedModel  # with PEFT's layers in it
    name: str  # empty for a model without an adapter
    layers: tuple[BaseTunerLayer, ...]  # the adapted layers
    wrappers: tuple[AuxiliaryTrainingWrapper, ...]  # around modules that PEFT replaces as a whole
    reason_not_paired: str | None  # why the two models cannot share one batch; None if they can
    state: SharedState  # what must not change while runners of this adapter decode
    virtual_tokens: int = 0  # P
    prompt_embeddings: Tensor | None = None  # [P, H], of prompt tuning and P-tuning
    prefix: Prefix | None = None  # of prefix tuning; with a sliding window, only slots in its reach

    @classmethod
    def read(cls, model: Any) -> "Adapter":
        """Read a `PeftModel`. Raise ValueError where its base model cannot be recovered."""
        if not isinstance(model, PeftModel):
            raise ValueError(f"model must be a PeftModel; got {type(model).__name__}.")
        peft_methods.check(model.peft_config)
        _check_one_active(model.active_adapters)
        modules, base_model = list(model.named_modules()), model.get_base_model()
        _check_known(base_model, modules)
        adapter = cls._from_modules(
            base_model, model.active_adapter, model.peft_config, modules, model
        )
        is_prompt = model.active_peft_config.is_prompt_learning
        return replace(adapter, **_prompt(model)) if is_prompt else adapter

    @classmethod
    def read_injected(cls, model: PreTrainedModel) -> "Adapter":
        """Read the layers that PEFT put into `model`, with or without a `PeftModel` around it.

        Raise ValueError where there are none or the base model cannot be recovered.
        """
        peft_methods.check(getattr(model, "peft_config", {}))
        modules = list(model.named_modules())
        _check_known(model, modules)
        put = [module for _, module in modules if is_put(module)]
        layers = [module for module in put if isinstance(module, BaseTunerLayer)]
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
        return cls._from_modules(model, active[0], model.peft_config, modules)

    @classmethod
    def none(cls, model: PreTrainedModel) -> "Adapter":
        """Read a model that has no adapter. Raise ValueError if it has layers of PEFT."""
        modules = list(model.named_modules())
        for name, module in modules:
            if type(module).__module__.startswith("peft."):
                raise ValueError(
                    f"model must have no adapter; {name or 'it'} is a {type(module).__name__} of "
                    "PEFT. Give a PeftModel to SteeredEngine, or merge the adapter."
                )
        return cls(model, "", (), (), None, SharedState(modules, "", (), None))

    @functools.cached_property
    def copies(self) -> dict[Any, nn.Module]:
        """What computes in the place of each module of PEFT's, for all rows; made once.

        A layer is reduced to its arithmetic where it is known, else merged where that is exact,
        else copied as it is, over the modules of the base model.
        """
        known = {}
        for layer in self.layers:
            made = adapter_terms.reduced(layer, self.name) or adapter_terms.merged(layer, self.name)
            if made is not None:
                known[layer] = made
        others: list[Any] = [x for x in (*self.layers, *self.wrappers) if x not in known]
        shared = {id(module): module for module in self.originals.values()}
        return known | dict(zip(others, copy.deepcopy(others, shared), strict=True))

    @property
    def originals(self) -> dict[Any, nn.Module]:
        """The module of the base model under each module of PEFT's."""
        return {x: _original(x) for x in (*self.layers, *self.wrappers)}

    @functools.cached_property
    def short(self) -> "Adapter":
        """This adapter of a model of a few layers, to try runners on; it shares `copies`."""
        short = replace(self, base_model=shortened(self.base_model))
        short.__dict__["copies"] = self.copies
        return short

    @classmethod
    def _from_modules(
        cls,
        base_model: Any,
        name: str,
        configs: Mapping[str, Any],
        modules: Modules,
        owner: PeftModel | None = None,
    ) -> "Adapter":
        put: list[tuple[str, Any]] = [x for x in modules if is_put(x[1])]
        return cls(
            base_model,
            name,
            layers=tuple(m for _, m in put if isinstance(m, BaseTunerLayer)),
            wrappers=tuple(m for _, m in put if isinstance(m, AuxiliaryTrainingWrapper)),
            reason_not_paired=_reason_not_paired(put),
            state=SharedState(modules, name, configs.keys() - {name}, owner),
        )


def _original(put: Any) -> nn.Module:
    return put.get_base_layer() if isinstance(put, BaseTunerLayer) else put.original_module


def _check_one_active(adapters: list[str]) -> None:
    if len(adapters) != 1:
        raise ValueError(
            f"model must have one active adapter; got {adapters}. "
            "Choose with model.set_adapter(name)."
        )


def _check_known(base_model: nn.Module, modules: Modules) -> None:
    """Raise ValueError for a module of PEFT that would stay in the base model."""
    in_base: dict[str, nn.Module] = {}
    for name, module in modules:
        parent, _, last = name.rpartition(".")
        above = in_base.get(parent)
        if above is None and module is not base_model:
            continue
        if above is not None and is_put(above) and last not in UNDER:
            continue  # a part of PEFT's own layer
        in_base[name] = module
        if type(module).__module__.startswith("peft.") and not is_put(module):
            raise ValueError(
                f"model has a {type(module).__name__} of PEFT in {name}, from which the base "
                "model cannot be taken: it cannot be steered. docs/limits.md lists the methods "
                "that can."
            )


def _reason_not_paired(put: list[tuple[str, Any]]) -> str | None:
    for name, module in put:
        if "experts" in name.split("."):
            return f"{name} is an expert, which sees the tokens routed to it and not whole halves"
        if adapter_terms.reader(module) is None and not goes_row_by_row(_original(module)):
            return f"{name} is more than a layer of one input, and adapted as a whole"
    return None


@torch.no_grad()
def _prompt(model: PeftModel) -> dict[str, Any]:
    """Return the fields of an adapter that only the prompt methods have."""
    config, prompt = model.active_peft_config, model.get_prompt(batch_size=1)
    fields: dict[str, Any] = {"virtual_tokens": config.num_virtual_tokens}
    if config.peft_type.value not in ("CARTRIDGE", "PREFIX_TUNING"):
        return fields | {"prompt_embeddings": prompt[0]}
    cache: Cache = prompt  # type: ignore[assignment]
    return fields | {"prefix": [(layer.keys[0], layer.values[0]) for layer in cache.layers]}  # type: ignore
