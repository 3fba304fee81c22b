"""A PEFT adapter as terms of single layers, read over a model without weights.

The methods that scale by the base's weights (DoRA) are read when these pass on their way into vLLM.
"""

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from svd_engine.model import adapter_file, adapter_terms, peft_methods
from svd_engine.model.adapter_layers import AdaptedEmbedding, AdaptedLinear
from svd_engine.model.shared_state import is_put

Terms = AdaptedLinear | AdaptedEmbedding
Weights = Iterable[tuple[str, Tensor]]


class AdapterTerms:
    """The terms of an adapter, by the name that their layer has in transformers."""

    def __init__(self, config: PretrainedConfig, folder: str | Path) -> None:
        peft_config = adapter_file.read_config(folder)
        peft_methods.check({str(folder): peft_config})
        model = _hollow(config)
        try:
            peft_model = adapter_file.load(model, folder, peft_config)
        except Exception as error:  # of any kind, where a value in the files is wrong
            raise ValueError(
                f"adapter {str(folder)!r} does not fit the base ({type(model).__name__}): {error}"
            ) from error
        self._adapter = peft_model.active_adapter
        self._layers = {name: layer for name, layer in model.named_modules() if is_put(layer)}
        self.found: dict[str, Terms] = {}
        self._waiting: dict[str, dict[str, Tensor]] = {}  # DoRA, and the weights it has met
        for name, layer in self._layers.items():
            if adapter_terms.reader(layer) is None:
                raise ValueError(f"{name} is adapted as a whole, which vLLM's layers cannot be.")
            if _is_dora(layer, self._adapter):
                self._waiting[name] = {}
            else:
                self._read(name)

    @property
    def needs_weights(self) -> bool:
        return bool(self._waiting)

    def watch(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights of the base as they come, and read what waits for them."""
        for name, tensor in weights:
            layer, _, kind = name.rpartition(".")
            if layer in self._waiting:
                self._waiting[layer][kind] = tensor
                self._read_if_whole(layer)
            yield name, tensor
        for name in self._waiting:
            raise ValueError(f"the base's weights of {name} did not come, which its DoRA needs.")

    def _read_if_whole(self, name: str) -> None:
        base: Any = self._layers[name].get_base_layer()  # type: ignore[operator]
        met = self._waiting[name]
        if met.keys() != {kind for kind, x in base._parameters.items() if x is not None}:
            return
        hollow = base._parameters
        base._parameters = {k: nn.Parameter(x.cpu(), requires_grad=False) for k, x in met.items()}
        self._read(name)
        base._parameters = hollow
        del self._waiting[name]

    def _read(self, name: str) -> None:
        terms = adapter_terms.reduced(self._layers[name], self._adapter)  # type: ignore[arg-type]
        if not isinstance(terms, Terms):
            raise ValueError(f"{name} is adapted in a way that vLLM's layers cannot take.")
        self.found[name] = terms


def _hollow(config: PretrainedConfig) -> Any:
    """Build a model whose weights are zeros that take no memory."""
    config = copy.deepcopy(config)
    config.architectures = None
    with init_empty_weights():  # of parameters alone: Gemma's scale of embeddings is a buffer
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for module in model.modules():
        for name, x in module._parameters.items():
            if x is not None:
                zeros = torch.zeros((), device="cpu").expand(x.shape)
                module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
    return model


def _is_dora(layer: Any, adapter: str) -> bool:
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    return type(variant).__name__ in adapter_terms.DORA
