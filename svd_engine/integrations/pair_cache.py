"""The PEFT model that a running `generate` belongs to, and its pair, kept from call to call."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from svd_engine.model import cuda_graphs, peft_adapter
from svd_engine.model.pair import Decoder, PairedRunner, pair_models

Fingerprint = tuple[Any, ...]
_pairs: WeakKeyDictionary[PreTrainedModel, tuple[Fingerprint, Decoder]] = WeakKeyDictionary()


class Injected:
    """What `pairing` asks of a PeftModel, read off the layers that PEFT put into its base model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.active_adapters = sorted({a for x in _tuned(model) for a in x.active_adapters})
        self.named_modules = model.named_modules

    @property
    def active_adapter(self) -> str:
        return self.active_adapters[0]

    @property
    def active_peft_config(self) -> Any:
        return self._model.peft_config[self.active_adapter]

    def get_base_model(self) -> PreTrainedModel:
        return self._model


@contextmanager
def borrow(model: PreTrainedModel) -> Iterator[Decoder]:
    """The pair behind `model`, which `generate` runs; a call in another thread gets another.

    It is built once and again whenever the adapter's weights, scale or name have changed. Raises
    ValueError where no PEFT model is behind it or the base model cannot be had back.
    """
    peft_model = _behind(model)
    peft_adapter.check_recoverable(peft_model)
    fingerprint = _fingerprint(peft_model)
    kept, decoder = _pairs.pop(model, (None, None))
    if decoder is None or kept != fingerprint:
        pair = pair_models(peft_model)
        for stream in (pair.stream,) if isinstance(pair, PairedRunner) else pair.streams:
            # PEFT puts a bound method here, which would keep the model alive for ever.
            vars(stream.model).pop("prepare_inputs_for_generation", None)
        decoder = cuda_graphs.decoder(pair)
    try:
        yield decoder
    finally:
        _pairs[model] = fingerprint, decoder


def _behind(model: PreTrainedModel) -> Any:
    # While it generates, PEFT puts its own method in the model's place for the prompt methods.
    owner = getattr(model.prepare_inputs_for_generation, "__self__", None)
    if isinstance(owner, PeftModel):
        return owner
    layers = _tuned(model)
    if not layers:
        raise ValueError(
            f"model must be a PeftModel; got {type(model).__name__} without an adapter. Load one "
            "with PeftModel.from_pretrained(model, adapter)."
        )
    for layer in layers:
        for hook in layer._forward_pre_hooks.values():
            for name in getattr(hook, "keywords", {}).keys() & {"adapter_names", "alora_offsets"}:
                raise ValueError(f"{name} is not supported; choose with model.set_adapter(name).")
    return Injected(model)


def _tuned(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@torch.no_grad()
def _fingerprint(model: Any) -> Fingerprint:
    """Differs once the pair's copies of the adapter, or its tree of modules, are out of date.

    Contents are compared: some optimizers write to weights without telling autograd.
    """
    modules = list(model.get_base_model().modules())
    layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
    parts: list[nn.Module] = [
        part
        for layer in layers
        for name, part in layer.named_children()  # type: ignore[attr-defined]
        if name != "base_layer"
    ]
    if model.active_peft_config.is_prompt_learning:
        parts.append(model.prompt_encoder)
    weights = [weight for part in parts for weight in part.parameters()]
    sums = [weight.sum(dtype=torch.float64) for weight in weights]
    return (
        model.active_adapter,
        [id(module) for module in modules],
        [repr(getattr(layer, "scaling", None)) for layer in layers],
        [(weight.dtype, weight.device) for weight in weights],
        torch.stack([x.to(sums[0].device) for x in sums]).tolist(),
    )
