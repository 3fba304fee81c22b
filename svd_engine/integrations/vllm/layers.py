"""An adapter's terms on vLLM's layers, for the second half of the rows.

They are added where vLLM's own LoRA adds its own, in a layer's `quant_method`, so a quantised base
is computed by its own method. Across ranks they are cut as the layer's weight is: a row-parallel
layer's sum over the ranks completes both.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import PPMissingLayer

from svd_engine.integrations.vllm.terms import Terms
from svd_engine.model.adapter_layers import AdaptedEmbedding, AdaptedLinear

PARTS = "down", "up", "bias", "input_scale", "output_scale"  # buffers svd_<part> of a layer


def attach(model: Any, found: dict[str, Terms], config: Any) -> None:
    """Add terms, by the names of transformers, to the layers of vLLM's model.

    Raise ValueError for one that has no layer in any stage of the pipeline.
    """
    elsewhere = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, PPMissingLayer)
    )
    rest = {name: x for name, x in found.items() if not f"{name}.".startswith(elsewhere)}
    dtype = config.dtype
    head = getattr(model, "lm_head", None) or model.model.embed_tokens
    if "lm_head" in rest:
        if config.head_dtype != dtype:
            raise ValueError("an adapted head needs the model's own dtype; leave out head_dtype.")
        _put(head, [rest.pop("lm_head")], dtype)
    if "model.embed_tokens" in rest:
        model.doubled.embedding = _Embedding(rest.pop("model.embed_tokens"), model, dtype)
    packed = getattr(model, "packed_modules_mapping", {})
    for name, module in model.named_modules():
        if not isinstance(module, LinearBase):
            continue
        parent, _, last = name.rpartition(".")
        names = [f"{parent}.{part}" for part in packed.get(last, [last])]
        if rest.keys() & set(names):
            _put(module, [rest.pop(part, None) for part in names], dtype)
    for name in rest:
        raise ValueError(f"the adapter has terms for {name}, which vLLM's model has not.")


def _put(layer: Any, parts: Sequence[Any], dtype: torch.dtype) -> None:
    """Give a layer, which may hold several layers of transformers, the terms of its parts."""
    for part in parts:
        if part is not None and not isinstance(part, AdaptedLinear):
            raise ValueError(f"a {type(part).__name__} is no change of {type(layer).__name__}.")
    buffers = _Cut(layer, parts, dtype).buffers()
    for name in PARTS:
        layer.register_buffer(f"svd_{name}", buffers.get(name), persistent=False)
    method = copy.copy(layer.quant_method)  # one may serve several layers
    base_apply = method.apply

    def apply(layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        n = x.shape[0] // 2
        if layer.svd_input_scale is not None:
            x = torch.cat((x[:n], x[n:] * layer.svd_input_scale))
        y = base_apply(layer, x, bias)
        adapted = y[n:]
        if layer.svd_down is not None:
            adapted.addmm_(x[n:] @ layer.svd_down, layer.svd_up)
        if layer.svd_bias is not None:
            adapted += layer.svd_bias
        if layer.svd_output_scale is not None:
            adapted *= layer.svd_output_scale
        return y

    method.apply = apply
    layer.quant_method = method
    layer.requires_unquantized_input = True  # or an activation may hand over a quantised one


class _Cut:
    """The terms of a layer's parts in one, cut to this rank's share of the layer."""

    def __init__(self, layer: Any, parts: Sequence[AdaptedLinear | None], dtype: torch.dtype):
        self.layer, self.parts, self.dtype = layer, parts, dtype
        self.device = next(layer.parameters()).device
        self.is_row_parallel = isinstance(layer, RowParallelLinear)
        if isinstance(layer, VocabParallelEmbedding):
            self.inputs, self.outputs = layer.embedding_dim, layer.num_embeddings_per_partition
        else:
            self.inputs = getattr(layer, "input_size_per_partition", layer.input_size)
            self.outputs = getattr(layer, "output_size_per_partition", layer.output_size)
        is_qkv = isinstance(layer, QKVParallelLinear)
        self.shards: Sequence[Any] = "qkv" if is_qkv else range(len(parts))

    def buffers(self) -> dict[str, Tensor]:
        held = [part for part in self.parts if part is not None]
        found = {}
        pairs = [None if part is None else part.low_rank for part in self.parts]
        ranks = [0 if pair is None else len(pair[0]) for pair in pairs]
        if total := sum(ranks):
            found["down"], found["up"] = self._low_rank(ranks, total)
        biases = [None if pair is None else pair[2] for pair in pairs]
        if any(x is not None for x in biases) and self._adds_bias():
            found["bias"] = self._outputs(biases, 0.0)
        scales = [None if p is None else p.output_scale for p in self.parts]
        if any(x is not None for x in scales):
            found["output_scale"] = self._outputs(scales, 1.0)
        if inputs := [p.input_scale for p in held if p.input_scale is not None]:
            if len(self.parts) > 1:
                raise ValueError(
                    "the adapter scales the inputs of one layer among several that vLLM computes "
                    "as one. Use SteeredEngine."
                )
            found["input_scale"] = self._inputs(inputs[0], 0)
        return found

    def _low_rank(self, ranks: Sequence[int], total: int) -> tuple[Tensor, Tensor]:
        """A of all parts, one under the other, and B in blocks; both transposed."""
        down, up = self._empty(total, self.inputs), self._empty(self.outputs, total)
        start = 0
        for part, rank, shard in zip(self.parts, ranks, self.shards, strict=True):
            if not rank:
                continue
            assert part is not None and part.low_rank is not None
            a, b = part.low_rank[:2]
            down[start : start + rank] = self._inputs(a, 1)
            wide = torch.zeros(len(b), total, dtype=self.dtype)
            wide[:, start : start + rank] = b
            self._load(up, wide, shard)
            start += rank
        return down.T.contiguous(), up.T.contiguous()

    def _adds_bias(self) -> bool:
        return not (self.is_row_parallel and self.layer.tp_rank > 0)  # the sum has one

    def _outputs(self, values: Sequence[Tensor | None], neutral: float) -> Tensor:
        out = self._empty(self.outputs) + neutral
        for value, shard in zip(values, self.shards, strict=True):
            if value is not None:
                self._load(out, value.to(self.dtype), shard)
        return out

    def _inputs(self, value: Tensor, dim: int) -> Tensor:
        if self.is_row_parallel:
            value = value.narrow(dim, self.layer.tp_rank * self.inputs, self.inputs)
        return value.to(self.device, self.dtype)

    def _load(self, into: Tensor, value: Tensor, shard: Any) -> None:
        """Let the layer's own loader cut outputs."""
        parameter: Any = nn.Parameter(into, requires_grad=False)
        parameter.output_dim = 0
        if self.is_row_parallel:
            parameter.data.copy_(value)
        elif len(self.parts) > 1:
            self.layer.weight_loader(parameter, value, shard)
        else:
            self.layer.weight_loader(parameter, value)

    def _empty(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)


class _Embedding(nn.Module):
    """The embeddings of the adapted model, of those of the base."""

    down: Tensor
    up: Tensor
    output_scale: Tensor | None

    def __init__(self, terms: Terms, model: Any, dtype: torch.dtype) -> None:
        super().__init__()
        if not isinstance(terms, AdaptedEmbedding):
            raise ValueError(f"a {type(terms).__name__} is no change of an embedding.")
        device, norm = next(model.parameters()).device, terms.output_scale
        self.register_buffer("down", terms.down.to(device, dtype), persistent=False)
        self.register_buffer("up", terms.up.to(device, dtype), persistent=False)
        scale = None if norm is None else norm.to(device, dtype)
        self.register_buffer("output_scale", scale, persistent=False)

    def forward(self, tokens: Tensor, base: Tensor) -> Tensor:
        low = nn.functional.embedding(tokens, self.down)
        out = base + nn.functional.linear(low, self.up)
        return out if self.output_scale is None else out * self.output_scale
