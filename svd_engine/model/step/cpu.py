"""Runs a plan on the CPU: one native call per step (csrc/cpu/decoder.cpp)."""

import struct
from typing import Any

import torch
from torch import Tensor

from svd_engine.model.kv_cache import KVCache
from svd_engine.model.layers.linear import most_rows
from svd_engine.model.step.plan import Layer, Linear, Norm, Plan
from svd_engine.ops import cpu

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
FORMATS = {0: 0, 8: 1, 4: 2}  # by the bits of a code
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
MOST_TOKENS = 256  # 8 new tokens in 32 rows; a long prompt is better read by PyTorch
MOST_ALIKE = 16  # new tokens per row: of more, each has other bits than alone (kFewRows)
LINEAR_WORDS = 17  # of a linear layer
Words = list[int]


class CpuStep:
    """A plan as the words of csrc/cpu/decoder.h, which hold addresses of the plan's tensors."""

    most_tokens = MOST_TOKENS
    most_new = MOST_ALIKE
    is_tried_at_length = False
    lengths_on_device = False

    def __init__(self, plan: Plan) -> None:
        self.plan = plan  # keeps the tensors
        self.dtype = plan.norm.weight.dtype
        bits = plan.layers[0].query.bits
        self.how = "one native call" + (f", int{bits} weights" if bits else "")
        # Of all rows. Without a kernel for many rows PyTorch reads prompts sooner.
        has_panels = not bits and most_rows(self.dtype) >= MOST_TOKENS
        self.most_prompt_tokens = MOST_TOKENS if has_panels else 0
        self._tables: list[tuple[Tensor, Tensor]] = []
        self._positions = 0  # of the tables
        self._words = torch.empty(0, dtype=torch.int64)
        self._caches = torch.empty(0, dtype=torch.int64)
        self._layout: object = None

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
        scale = self.plan.embedding_scale
        embedded = embedded if scale is None else embedded * scale
        self.prepare(cache)
        rows, length, _ = embedded.shape
        hidden, logits = torch.empty_like(embedded), None
        if with_logits:
            assert self.plan.head is not None
            logits = embedded.new_empty(rows, length, len(self.plan.head.weight))
        cpu.decode(
            self._words, self._caches, embedded.contiguous(), positions, first_adapted_row, hidden,
            logits,
        )  # fmt: skip
        return hidden if logits is None else logits

    def prepare(self, cache: KVCache) -> None:
        """Renew the addresses if the cache lies elsewhere."""
        if self._layout is cache.layout:
            return
        layers = [cache.stored(i) for i in range(len(self.plan.layers))]
        words = [[k.data_ptr(), v.data_ptr(), cache.slots] for k, v in layers]
        self._caches, self._layout = torch.tensor(words), cache.layout
        if cache.slots > self._positions:
            self._positions, self._tables = 1 << (cache.slots - 1).bit_length(), []
            for rotary in self.plan.rotaries:  # OLMo 2's are float32 in any model
                cos, sin = rotary(self._positions)
                self._tables.append((cos.to(self.dtype), sin.to(self.dtype)))
            self._words = torch.tensor(self._plan_words())

    def _plan_words(self) -> Words:
        plan = self.plan
        words = [DTYPES[self.dtype], len(plan.layers), len(plan.norm.weight)]
        words += [FORMATS[plan.layers[0].query.bits]]
        words += _norm(plan.norm) + _linear(plan.head)
        for layer in plan.layers:
            words += self._layer_words(layer)
        return words

    def _layer_words(self, x: Layer) -> Words:
        words: Words = []
        for linear in (x.query, x.key, x.value, x.output, x.gate, x.up, x.down):
            words += _linear(linear)
        for norm in (
            x.attention_norm, x.query_norm, x.key_norm, x.attended_norm, x.feedforward_norm,
            x.fed_norm,
        ):  # fmt: skip
            words += _norm(norm)
        words += [x.heads, x.kv_heads, x.head_dim, x.window or 0]
        cos, sin = (None, None) if x.rotary is None else self._tables[x.rotary]
        words += [0 if cos is None else cos.shape[1], _address(cos), _address(sin)]
        words += [ACTIVATIONS[x.activation]]
        return [*words, _bits(x.scaling), _bits(x.softcap or 0.0), _bits(x.residual_scale)]


def _linear(x: Linear | None) -> Words:
    if x is None:
        return [0] * LINEAR_WORDS
    out, fan_in = len(x.weight), x.fan_in or x.weight.shape[1]
    down, up, up_bias = x.low_rank or (None, None, None)
    scale = x.input_scale if x.input_scale is not None else x.output_scale
    return [
        *_matrix(x.weight), out, fan_in, *_vector(x.bias),
        *_matrix(down), 0 if down is None else len(down), *_matrix(up), *_vector(up_bias),
        0 if down is None else DTYPES[down.dtype],
        _address(x.input_scale), _address(x.output_scale),
        0 if scale is None else DTYPES[scale.dtype],
    ]  # fmt: skip


def _norm(x: Norm | None) -> Words:
    if x is None:
        return [0] * 5
    form = x.form
    return [
        _address(x.weight), len(x.weight), _bits(x.eps), _bits(form.offset),
        int(form.rounded_between),
    ]  # fmt: skip


def _matrix(x: Tensor | None) -> Words:
    return [0, 0] if x is None else [x.data_ptr(), x.stride(0) * x.element_size()]


def _vector(x: Tensor | None) -> Words:
    return [0, 0] if x is None else [x.data_ptr(), x.stride(0) * x.element_size()]


def _address(x: Any) -> int:
    return 0 if x is None else x.data_ptr()


def _bits(x: float) -> int:
    return struct.unpack("<q", struct.pack("<d", x))[0]


def why_not(plan: Plan) -> str | None:
    """Return why the native step cannot run a plan, or None."""
    if (reason := cpu.unavailable()) is not None:
        return reason
    tensors = list(_tensors(plan))
    for x in tensors:
        if not x.is_cpu:
            return "the weights are not on the CPU"
    if len({x.bits for x in _parts(plan) if isinstance(x, Linear)}) > 1:
        return "only some of the linear layers are quantised"
    dtypes = {x.dtype for x in _weights(plan)}
    if len(dtypes) > 1 or not dtypes <= DTYPES.keys():
        return f"the weights are {', '.join(sorted(str(x).split('.')[1] for x in dtypes))}"
    if not {x.dtype for x in tensors} - {torch.uint8} <= DTYPES.keys():
        return "the adapter is neither float32 nor bfloat16"
    return None


def _parts(plan: Plan) -> Any:
    yield plan.norm
    if plan.head is not None:
        yield plan.head
    for layer in plan.layers:
        yield from (x for x in vars(layer).values() if isinstance(x, Linear | Norm))


def _weights(plan: Plan) -> Any:
    for part in _parts(plan):
        if isinstance(part, Norm) or not part.bits:
            yield part.weight
        if isinstance(part, Linear) and part.bias is not None:
            yield part.bias


def _tensors(plan: Plan) -> Any:
    yield from _weights(plan)
    for part in _parts(plan):
        if isinstance(part, Linear):
            yield part.weight
            for x in (*(part.low_rank or ()), part.input_scale, part.output_scale):
                if x is not None:
                    yield x
