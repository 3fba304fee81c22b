"""Runs a plan on a GPU by ten kernels per layer, which a CUDA graph can hold."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from svd_engine.model.kv_cache import KVCache
from svd_engine.model.step.plan import Layer, Linear, Norm, Plan
from svd_engine.ops import step
from svd_engine.ops.step import launch_linear, launch_step

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_TOKENS = 128  # new tokens of all rows; more are better multiplied by PyTorch


class _Layer(NamedTuple):
    """What the kernels take of a layer."""

    heads: "launch_step.Heads"
    rotary: int | None
    qkv: "launch_linear.Joined"
    output: "launch_linear.Joined"
    gate_up: "launch_linear.Joined"
    down: "launch_linear.Joined"
    output_input_scale: Tensor | None
    down_input_scale: Tensor | None
    attended_norm: "launch_step.Norm | None"
    feedforward_norm: "launch_step.Norm | None"
    fed_norm: "launch_step.Norm | None"
    next_norm: "launch_step.Norm | None"  # of the layer that follows, or the last
    is_gelu: bool
    residual_scale: float

    @property
    def inner(self) -> int:
        return self.down.weights[0].shape[1]


class CudaStep:
    """A plan as the arguments of kernels, whose weights are the model's own."""

    most_tokens = most_new = MOST_TOKENS
    most_prompt_tokens = 0  # of all rows: the modules read prompts
    is_tried_at_length = True  # compiled anew on each machine, by a compiler of many versions
    how = "cuda"
    lengths_on_device = True

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.dtype, self.device = plan.norm.weight.dtype, plan.norm.weight.device
        following = [x.attention_norm for x in plan.layers[1:]]
        norms = [*following, plan.norm]
        self._layers = [_layer(x, _norm(n)) for x, n in zip(plan.layers, norms, strict=True)]
        self._first_norm = _norm(plan.layers[0].attention_norm)
        self._head = None if plan.head is None else _join(plan.head)
        self._slots = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._tables: list[tuple[Tensor, Tensor]] = []
        self._positions = 0  # of the tables
        self._layout: object = None

    def prepare(self, cache: KVCache) -> None:
        """Follow the cache: steps, also those that are replayed, read its room on the device."""
        if self._layout is cache.layout:
            return
        self._layout = cache.layout
        self._slots.fill_(cache.slots)
        if cache.slots > self._positions:
            self._positions = 1 << (cache.slots - 1).bit_length()
            self._tables = [
                (cos.to(self.device), sin.to(self.device))
                for cos, sin in (rotary(self._positions) for rotary in self.plan.rotaries)
            ]
            cache.allocations += 1  # recorded steps read the former tables

    def run(
        self,
        embedded: Tensor,
        positions: Tensor,
        cache: KVCache,
        first_adapted_row: int,
        with_logits: bool,
    ) -> Tensor:
        """Return hidden states `[rows, q, H]`, or logits `[rows, q, V]`, of q new tokens per row.

        embedded: `[rows, q, H]`; positions: int64 `[rows]`, the slot of each row's first new token.
        """
        self.prepare(cache)
        scale = self.plan.embedding_scale
        embedded = embedded if scale is None else embedded * scale
        sequences, new, width = embedded.shape
        rows, first = sequences * new, first_adapted_row * new
        places = launch_step.Places(positions, new, self._slots, first)
        stream = embedded.reshape(rows, width).contiguous()
        normal, workspace = torch.empty_like(stream), self._workspace(rows)
        launch_step.finish_with_norm(None, None, stream, 1.0, self._first_norm, 0, stream, normal)
        for i, layer in enumerate(self._layers):
            heads = layer.heads
            query = stream.new_empty(rows, heads.heads, heads.dim)
            attended, fed = torch.empty_like(query), stream.new_empty(rows, layer.inner)
            keys, values = cache.stored(i)
            parts = launch_step.product(normal, layer.qkv, workspace)
            tables = None if layer.rotary is None else self._tables[layer.rotary]
            launch_step.finish_with_heads(parts, heads, places, tables, query, keys, values)
            launch_step.attend(
                query, keys, values, heads, places, layer.output_input_scale, workspace, attended
            )
            parts = launch_step.product(attended.flatten(1), layer.output, workspace)
            launch_step.finish_with_norm(
                parts, layer.attended_norm, stream, layer.residual_scale, layer.feedforward_norm,
                first, stream, normal,
            )  # fmt: skip
            parts = launch_step.product(normal, layer.gate_up, workspace)
            launch_step.finish_with_gate(parts, layer.is_gelu, layer.down_input_scale, first, fed)
            parts = launch_step.product(fed, layer.down, workspace)
            launch_step.finish_with_norm(
                parts, layer.fed_norm, stream, layer.residual_scale, layer.next_norm, first,
                stream, normal,
            )  # fmt: skip
        if with_logits:
            assert self._head is not None
            logits = stream.new_empty(rows, self._head.outputs)
            launch_linear.linear(normal, self._head, first, logits)
            return logits.view(sequences, new, -1)
        return normal.view(sequences, new, width)

    def _workspace(self, rows: int) -> Tensor:
        """Memory for a product, or for attention: each is used up before the next begins."""
        size = 0
        for x in self._layers:
            joined = [x.qkv, x.output, x.gate_up, x.down]
            size = max(size, launch_step.workspace_size(rows, joined))
            size = max(size, launch_step.attention_size(rows, x.heads))
        return torch.empty(size, dtype=torch.float32, device=self.device)


def _layer(x: Layer, next_norm: "launch_step.Norm | None") -> _Layer:
    heads = launch_step.Heads(
        x.heads, x.kv_heads, x.head_dim, x.scaling, x.window or 0, x.softcap or 0.0,
        _norm(x.query_norm), _norm(x.key_norm),
    )  # fmt: skip
    return _Layer(
        heads, x.rotary, _join(x.query, x.key, x.value),
        _join(x.output), _join(x.gate, x.up), _join(x.down),
        x.output.input_scale, x.down.input_scale, _norm(x.attended_norm),
        _norm(x.feedforward_norm), _norm(x.fed_norm), next_norm, x.activation == "gelu_tanh",
        x.residual_scale,
    )  # fmt: skip


def _join(*layers: Linear) -> "launch_linear.Joined":
    return launch_linear.join([_with_scale_in_adapter(x) for x in layers])


def _with_scale_in_adapter(x: Linear) -> Linear:
    """Scale the adapter's term: the kernels scale the base's alone."""
    if x.low_rank is None or x.output_scale is None:
        return x
    down, up, up_bias = x.low_rank
    up = up * x.output_scale[:, None]
    up_bias = None if up_bias is None else up_bias * x.output_scale
    return replace(x, low_rank=(down, up, up_bias))


def _norm(x: Norm | None) -> "launch_step.Norm | None":
    return None if x is None else launch_step.Norm(x.weight, x.eps, x.form.offset)


def why_not(plan: Plan) -> str | None:
    """Return why the kernels cannot run a plan, or None."""
    if (reason := step.unavailable(plan.norm.weight.device)) is not None:
        return reason
    weights = [plan.norm.weight]
    for x in [plan.head, *(y for layer in plan.layers for y in vars(layer).values())]:
        if isinstance(x, Linear | Norm):
            weights.append(x.weight)
    if len({x.device for x in weights}) > 1:
        return "the weights are on several devices"
    dtypes = {x.dtype for x in weights}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return f"the weights are {', '.join(sorted(str(x).split('.')[1] for x in dtypes))}"
    if any((x.query_norm is None) != (x.key_norm is None) for x in plan.layers):
        return "queries alone are normalised, or keys alone"
    return None
