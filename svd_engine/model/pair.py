"""The adapted and the base model as one object: what a decoding loop and a scorer call."""

import copy
import logging
from collections.abc import Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from svd_engine.model.kept_rows import Beginning, KeptRow, PerModel
from svd_engine.model.module_tree import adapted_tree, base_tree, paired_tree
from svd_engine.model.peft_adapter import Adapter
from svd_engine.model.runner import ModelRunner
from svd_engine.model.step import use_native_step

logger = logging.getLogger(__name__)

Prompts = Sequence[Sequence[int]]
# PerModel is of the adapted and the base model, or of a single model.


class Decoder(Protocol):
    """What a decoding loop calls; `PairedRunner` documents the methods."""

    @property
    def device(self) -> torch.device: ...
    @property
    def overlaps_host(self) -> bool:
        """Whether the device may run a step while the host reads tokens."""

    def prefill(
        self,
        prompts: Prompts,
        max_new_tokens: int = 0,
        max_rows: int = 0,
        contrast: Prompts | None = None,
        chunk: int | None = None,
    ) -> PerModel: ...
    def resume(
        self,
        prompts: Prompts,
        beginnings: Sequence[Beginning],
        max_new_tokens: int = 0,
        max_rows: int = 0,
        chunk: int | None = None,
    ) -> PerModel: ...
    def take(self, row: int, tokens: int, hidden: PerModel) -> KeptRow: ...
    def step(self, tokens: Tensor) -> PerModel: ...
    def most_new(self, rows: int) -> int: ...
    def set_back(self, tokens: Tensor) -> None: ...
    def reorder(self, index: Tensor) -> None: ...
    def logits(self, hidden: Sequence[Tensor]) -> PerModel: ...


class PairedRunner:
    """Both models as one batch [base rows, adapted rows]: each weight is read once per step."""

    overlaps_host = False

    def __init__(self, adapter: Adapter) -> None:
        self.runner = ModelRunner(
            paired_tree(adapter),
            paired=True,
            virtual_tokens=adapter.virtual_tokens,
            prompt_embeddings=adapter.prompt_embeddings,
            prefix=adapter.prefix,
        )

    @property
    def runners(self) -> tuple[ModelRunner, ...]:
        return (self.runner,)

    def fork(self) -> "PairedRunner":
        """Return the same pair with a cache of its own."""
        other = copy.copy(self)
        other.runner = self.runner.fork()
        return other

    @property
    def device(self) -> torch.device:
        return self.runner.model.device

    @property
    def how(self) -> str:
        """How decode steps run, and if module by module, why."""
        return self.runner.how

    @property
    def memory_key(self) -> Hashable:
        """A value that changes when tensors that outlive a request are allocated anew."""
        return self.runner.memory_key

    @property
    def lengths_on_device(self) -> bool:
        """Whether a captured step of some rows serves any lengths and room in the cache."""
        return self.runner.lengths_on_device

    def prefill(
        self,
        prompts: Prompts,
        max_new_tokens: int = 0,
        max_rows: int = 0,
        contrast: Prompts | None = None,
        chunk: int | None = None,
    ) -> PerModel:
        """Return hidden states of (adapted, base) at each prompt's last token, `[B, H]` each.

        The KV cache gets slots for `max_new_tokens` more tokens per row and, for `reorder`, at
        least `max_rows` rows. contrast: what the base reads in the place of the prompts. chunk: the
        most tokens of a row to read at once, if there is a limit.
        """
        rows = [*(prompts if contrast is None else contrast), *prompts]
        return _halves(self.runner.prefill(rows, max_new_tokens, 2 * max_rows, chunk))

    def resume(
        self,
        prompts: Prompts,
        beginnings: Sequence[Beginning],
        max_new_tokens: int = 0,
        max_rows: int = 0,
        chunk: int | None = None,
    ) -> PerModel:
        """Return what `prefill` does, reading of each prompt only what follows its beginning.

        chunk: the most tokens of a row to read at once.
        """
        room = room_beyond(prompts, beginnings) + max_new_tokens
        caches = [(x.kept.caches[model], x.tokens) for model in (0, 1) for x in beginnings]
        self.runner.put(caches, room, 2 * max_rows)
        adapted, base = _hidden(beginnings)
        rest = [prompt[x.tokens :] for prompt, x in zip(prompts, beginnings, strict=True)]
        return _halves(self.runner.read_on([*rest, *rest], torch.cat([base, adapted]), chunk))

    def take(self, row: int, tokens: int, hidden: PerModel) -> KeptRow:
        """Keep the first tokens of a row's text. hidden: of that row, after its prompt."""
        half = len(self.runner.positions) // 2
        return KeptRow(
            (self.runner.take(row, tokens), self.runner.take(half + row, tokens)), hidden
        )

    def extend(self, tokens: Tensor, kv_length: int | None = None) -> PerModel:
        """Return hidden states of (adapted, base) after more tokens `[B, q]`, `[B, q, H]` each.

        kv_length: upper bound on positions, see `ModelRunner.extend`.
        """
        return _halves(self.runner.extend(tokens.repeat(2, 1), kv_length))

    def step(self, tokens: Tensor, kv_length: int | None = None) -> PerModel:
        """Return logits of (adapted, base) after one more token per row `[B]`, `[B, V]` each.

        Of several, `[B, q]`, return those after each: `[B, q, V]`.
        """
        return _halves(self.runner.step(torch.cat([tokens, tokens]), kv_length))

    def most_new(self, rows: int) -> int:
        """Return of how many new tokens per row a step gives each the bits that it has alone."""
        return self.runner.most_new(2 * rows)

    def set_back(self, tokens: Tensor) -> None:
        """Forget each row's latest tokens in both models, `[B]` of them."""
        self.runner.set_back(tokens.repeat(2))

    @property
    def longest(self) -> int:
        """The most tokens of text in a row."""
        return self.runner.longest

    def reorder(self, index: Tensor) -> None:
        """Let row i of both models continue from former row index[i]; int64 `[R]`."""
        self.runner.reorder(torch.cat([index, index + len(self.runner.positions) // 2]))

    def logits(self, hidden: Sequence[Tensor]) -> PerModel:
        """Return logits of (adapted, base) from their hidden states `[N, H]`."""
        return _halves(self.runner.logits(torch.cat(tuple(hidden)[::-1])))


def _halves(rows: Tensor) -> PerModel:
    base, adapted = rows.chunk(2)
    return adapted, base


class SequentialRunner:
    """One pass per model, each with its own KV cache.

    Right for every PEFT method, and the way to run a single model.
    """

    overlaps_host = False

    def __init__(self, *runners: ModelRunner) -> None:
        self.runners = runners

    def fork(self) -> "SequentialRunner":
        """Return the same models with caches of their own."""
        return SequentialRunner(*(runner.fork() for runner in self.runners))

    @property
    def device(self) -> torch.device:
        return self.runners[0].model.device

    @property
    def how(self) -> str:
        """How decode steps of each model run, in one line if they run alike."""
        ways = [r.how for r in self.runners]
        if len(set(ways)) == 1:
            return ways[0]
        return "; ".join(
            f"{name}: {way}" for name, way in zip(("adapted", "base"), ways, strict=True)
        )

    @property
    def memory_key(self) -> Hashable:
        return tuple(r.memory_key for r in self.runners)

    @property
    def lengths_on_device(self) -> bool:
        return all(r.lengths_on_device for r in self.runners)

    def prefill(
        self,
        prompts: Prompts,
        max_new_tokens: int = 0,
        max_rows: int = 0,
        contrast: Prompts | None = None,
        chunk: int | None = None,
    ) -> PerModel:
        read = [prompts] * len(self.runners)
        if contrast is not None:
            read[-1] = contrast
        each = zip(self.runners, read, strict=True)
        return tuple(r.prefill(rows, max_new_tokens, max_rows, chunk) for r, rows in each)

    def resume(
        self,
        prompts: Prompts,
        beginnings: Sequence[Beginning],
        max_new_tokens: int = 0,
        max_rows: int = 0,
        chunk: int | None = None,
    ) -> PerModel:
        room = room_beyond(prompts, beginnings) + max_new_tokens
        rest = [prompt[x.tokens :] for prompt, x in zip(prompts, beginnings, strict=True)]
        read = []
        for model, (r, hidden) in enumerate(zip(self.runners, _hidden(beginnings), strict=True)):
            r.put([(x.kept.caches[model], x.tokens) for x in beginnings], room, max_rows)
            read.append(r.read_on(rest, hidden, chunk))
        return tuple(read)

    def take(self, row: int, tokens: int, hidden: PerModel) -> KeptRow:
        return KeptRow(tuple(r.take(row, tokens) for r in self.runners), hidden)

    def extend(self, tokens: Tensor, kv_length: int | None = None) -> PerModel:
        return tuple(r.extend(tokens, kv_length) for r in self.runners)

    def step(self, tokens: Tensor, kv_length: int | None = None) -> PerModel:
        return tuple(r.step(tokens, kv_length) for r in self.runners)

    def most_new(self, rows: int) -> int:
        return min(r.most_new(rows) for r in self.runners)

    def set_back(self, tokens: Tensor) -> None:
        for r in self.runners:
            r.set_back(tokens)

    @property
    def longest(self) -> int:
        return max(r.longest for r in self.runners)

    def reorder(self, index: Tensor) -> None:
        for r in self.runners:
            r.reorder(index)

    def logits(self, hidden: Sequence[Tensor]) -> PerModel:
        return tuple(r.logits(h) for r, h in zip(self.runners, hidden, strict=True))


ModelPair = PairedRunner | SequentialRunner


def room_beyond(prompts: Prompts, beginnings: Sequence[Beginning]) -> int:
    """Return how many tokens every row may be padded by while the others read on."""
    return max(len(p) - x.tokens for p, x in zip(prompts, beginnings, strict=True))


def _hidden(beginnings: Sequence[Beginning]) -> PerModel:
    """Stack the hidden states that were kept, `[rows, H]` of each model."""
    return tuple(map(torch.stack, zip(*(x.kept.hidden for x in beginnings), strict=True)))


def adapted_runner(adapter: Adapter, native: bool = True) -> ModelRunner:
    """Build the runner of the adapted model alone; native: let it take native steps if it can."""
    runner = ModelRunner(
        adapted_tree(adapter),
        virtual_tokens=adapter.virtual_tokens,
        prompt_embeddings=adapter.prompt_embeddings,
        prefix=adapter.prefix,
    )
    if native:
        use_native_step(runner, lambda: adapted_runner(adapter.short, native=False))
    return runner


def base_runner(adapter: Adapter, native: bool = True) -> ModelRunner:
    """Build the runner of the base model alone; native: let it take native steps if it can."""
    runner = ModelRunner(base_tree(adapter))
    if native:
        use_native_step(runner, lambda: base_runner(adapter.short, native=False))
    return runner


def pair_models(adapter: Adapter, pairing: str = "auto") -> ModelPair:
    """Build both models; pairing is "auto", "paired" or "sequential". Raise ValueError.

    "auto" pairs what can be paired, unless each model alone has a native step and the pair none.
    """
    if pairing not in ("auto", "paired", "sequential"):
        raise ValueError(f"pairing must be 'auto', 'paired' or 'sequential'; got {pairing!r}.")
    reason = adapter.reason_not_paired
    if reason is None and pairing != "sequential":
        pair = PairedRunner(adapter)
        use_native_step(pair.runner, lambda: PairedRunner(adapter.short).runner)
        return pair if pairing == "paired" else _native_models(adapter, pair) or pair
    if pairing == "paired":
        raise ValueError(f"pairing='paired' is not possible: {reason}. pairing='auto' decodes it.")
    if pairing == "auto":
        logger.warning("Two forward passes per token, because %s.", reason)
    return SequentialRunner(adapted_runner(adapter), base_runner(adapter))


def _native_models(adapter: Adapter, pair: PairedRunner) -> SequentialRunner | None:
    """Build a runner of each model, if both have a native step where the pair has none.

    Two native steps take less time than one of the pair, module by module.
    """
    if pair.runner.native is not None or not adapter.layers:
        return None
    adapted = adapted_runner(adapter)
    if adapted.native is None:
        return None
    base = base_runner(adapter)
    return None if base.native is None else SequentialRunner(adapted, base)
