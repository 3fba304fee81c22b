"""Keeps the pair of models behind a running `generate` from one call to the next."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from svd_engine.model import cuda_graphs, probe
from svd_engine.model.pair import Decoder, PairedRunner, pair_models
from svd_engine.model.peft_adapter import Adapter

Fingerprint = tuple[Any, ...]
_pairs: WeakKeyDictionary[PreTrainedModel, tuple[Fingerprint, Decoder]] = WeakKeyDictionary()


@contextmanager
def borrow(model: PreTrainedModel) -> Iterator[Decoder]:
    """Lend the pair behind `model`, which `generate` runs; a call in another thread gets another.

    The pair is built once, and again whenever the adapter's weights, scale or name have changed.
    Raises ValueError where there is no PEFT model, its base model cannot be recovered, or the first
    pair does not give what the plain models give.
    """
    owner, adapter = _read(model)
    fingerprint = _fingerprint(adapter)
    kept, decoder = _pairs.pop(model, (None, None))
    if decoder is None or kept != fingerprint:
        pair = pair_models(adapter)
        if decoder is None:
            probe.check(pair, adapter, owner)
        for runner in (pair.runner,) if isinstance(pair, PairedRunner) else pair.runners:
            # PEFT and transformers put methods here that would keep the model alive for ever.
            for name in ("prepare_inputs_for_generation", "generate"):
                vars(runner.model).pop(name, None)
        decoder = cuda_graphs.decoder(pair)
    try:
        yield decoder
    finally:
        _pairs[model] = fingerprint, decoder


def _read(model: PreTrainedModel) -> tuple[nn.Module, Adapter]:
    """Return the adapter, and the model that it was read from."""
    # While a prompt method generates, PEFT puts its own method in the model's place.
    owner = getattr(model.prepare_inputs_for_generation, "__self__", None)
    if isinstance(owner, PeftModel):
        return owner, Adapter.read(owner)
    return model, Adapter.read_injected(model)


@torch.no_grad()
def _fingerprint(adapter: Adapter) -> Fingerprint:
    """Return a value that differs once a pair built from the adapter would differ.

    Contents are compared too: some optimizers write to weights without telling autograd.
    """
    weights = adapter.state.adapter_tensors
    if adapter.prompt_embeddings is not None:
        weights.append(adapter.prompt_embeddings)
    weights += [tensor for layer in adapter.prefix or () for tensor in layer]
    sums = [weight.sum(dtype=torch.float64) for weight in weights]
    return (
        adapter.state.identity,
        [(weight.dtype, weight.device) for weight in weights],
        torch.stack([x.to(sums[0].device) for x in sums]).tolist(),
    )
