"""Decode steps as CUDA graphs, replayed for every token.

There is one per bucket of rows and number of new tokens, and of slots too where a step goes through
the modules.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svd_engine.model.kept_rows import Beginning, KeptRow, PerModel
from svd_engine.model.pair import Decoder, ModelPair, Prompts, room_beyond

logger = logging.getLogger(__name__)

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # more rows decode without a graph
SLOTS = 256  # and twice, four times, ... as many

TRIES = 2  # of a capture that fails; memory may be there the next time

Key = tuple[int, int, int, int]  # rows, new tokens; of the walk also slots and kv_length
Run = Callable[[], PerModel]
Replay = Callable[[], object]


class Step(NamedTuple):
    """A captured step: fill `tokens`, call `replay`, read `logits`."""

    tokens: Tensor
    replay: Replay
    logits: PerModel


def bucket_rows(rows: int) -> int:
    return next((size for size in ROWS if size >= rows), rows)


def bucket_slots(slots: int) -> int:
    return SLOTS << ((slots - 1) // SLOTS).bit_length()


# One capture at a time in the process: two would disturb each other.
_capturing = threading.Lock()


def record(run: Run, device: torch.device, pool: Any = None) -> tuple[Replay, PerModel]:
    """Capture `run`, which has run before. Return the replay and the tensors that it fills.

    pool: the memory pool, which graphs share that are replayed one after the other.
    """
    with _capturing, torch.cuda.device(device):
        index = torch.cuda.current_device()
        before = torch.cuda.current_stream(index)
        generator = torch.cuda.default_generators[index]
        state, graph = generator.clone_state(), torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle() if pool is None else pool
        stream = torch.cuda.Stream(index)
        try:
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                outputs = run()
        except Exception:
            # A capture that fails leaves its stream current, the allocator in its pool and the
            # generator unusable.
            torch.cuda.set_stream(before)
            generator.graphsafe_set_state(state)
            with suppress(RuntimeError):  # some versions have left the pool by themselves
                torch._C._cuda_endAllocateToPool(index, pool)
            raise
    return graph.replay, outputs


class Order:
    """Lets work on a device wait for what another stream did before with the same memory."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._is_cuda = device, device.type == "cuda"
        self._event: Any = None
        self._stream: Any = None

    def begin(self) -> None:
        if self._event is None:
            return
        stream = torch.cuda.current_stream(self._device)
        if stream != self._stream:
            stream.wait_event(self._event)

    def end(self) -> None:
        if self._is_cuda:
            self._event = self._event or torch.cuda.Event()
            self._stream = torch.cuda.current_stream(self._device)
            self._event.record(self._stream)


class Recordings:
    """Steps of one pair, captured once each and replayed.

    Where a capture fails a warning names the cause, and steps of that shape go on without a graph;
    it is tried `TRIES` times.
    """

    def __init__(
        self,
        device: torch.device,
        record: Callable[[Run, torch.device, Any], tuple[Replay, PerModel]] = record,
    ) -> None:
        self._device, self._record = device, record
        self._steps: dict[Key, Step] = {}
        self._failed: Counter[Key] = Counter()
        self._pool: Any = None  # of all steps' memory: only one step is replayed at a time
        self._memory_key: object = None  # of the tensors that the captured steps work on

    @property
    def graphs(self) -> int:
        """Number of captured steps."""
        return len(self._steps)

    @property
    def failures(self) -> int:
        """Number of captures that failed."""
        return self._failed.total()

    def step(
        self,
        key: Key,
        tokens: Tensor,
        run: Callable[[Tensor], PerModel],
        memory_key: object,
    ) -> PerModel:
        """Return the logits of `run(tokens)`, whose rows are padded to those of the key.

        The next step overwrites them. memory_key: changes when the tensors move that `run` works
        on.
        """
        if self._memory_key != memory_key:
            self._memory_key = memory_key
            self._steps.clear()
            self._pool = None  # the allocator gives up a pool with the last graph in it
        if (step := self._steps.get(key)) is None:
            return self._run_and_capture(key, tokens, run)
        step.tokens[: len(tokens)] = tokens
        step.replay()
        return step.logits

    def _run_and_capture(
        self, key: Key, tokens: Tensor, run: Callable[[Tensor], PerModel]
    ) -> PerModel:
        """Do a step without a graph, then capture it."""
        rows = key[0]
        padded = tokens.new_zeros(rows, *tokens.shape[1:])
        padded[: len(tokens)] = tokens
        logits = run(padded)
        if rows <= ROWS[-1] and self._failed[key] < TRIES:
            try:
                if self._pool is None and self._device.type == "cuda":
                    self._pool = torch.cuda.graph_pool_handle()
                captured = self._record(partial(run, padded), self._device, self._pool)
                self._steps[key] = Step(padded, *captured)
            except Exception as error:  # a graph cannot hold all that a model may do
                self._failed[key] += 1
                logger.warning(
                    "A step of %d rows goes on without a CUDA graph, because a capture failed: "
                    "%s: %s", rows, type(error).__name__, error,
                )  # fmt: skip
        return logits


class GraphedRunner:
    """A `Decoder` that replays a pair's decode steps from CUDA graphs.

    Rows and slots are rounded up, so that requests of many shapes share few graphs. Padding rows
    duplicate row 0.
    """

    overlaps_host = True

    def __init__(
        self,
        pair: ModelPair,
        record: Callable[[Run, torch.device, Any], tuple[Replay, PerModel]] = record,
    ) -> None:
        self.pair = pair
        self._recordings = Recordings(pair.device, record)
        self._order = Order(pair.device)
        self._rows = self._slots = 0  # of the request
        self._next_position = 0  # the highest that the next step writes

    @property
    def device(self) -> torch.device:
        return self.pair.device

    @property
    def graphs(self) -> int:
        """Number of captured steps."""
        return self._recordings.graphs

    @property
    def failures(self) -> int:
        """Number of captures that failed."""
        return self._recordings.failures

    def prefill(
        self,
        prompts: Prompts,
        max_new_tokens: int = 0,
        max_rows: int = 0,
        contrast: Prompts | None = None,
        chunk: int | None = None,
    ) -> PerModel:
        """Call the pair's, with rows and slots rounded up."""
        self._order.begin()
        self._rows = len(prompts)
        self._next_position = max(map(len, [*prompts, *(contrast or ())]))
        self._slots = bucket_slots(self._next_position + max_new_tokens)
        max_rows = bucket_rows(max(max_rows, self._rows))
        room = self._slots - self._next_position
        hidden = self.pair.prefill(prompts, room, max_rows, contrast, chunk)
        if bucket_rows(self._rows) > self._rows:
            self.reorder(torch.arange(self._rows, device=self.device))
        self._order.end()
        return hidden

    def resume(
        self,
        prompts: Prompts,
        beginnings: Sequence[Beginning],
        max_new_tokens: int = 0,
        max_rows: int = 0,
        chunk: int | None = None,
    ) -> PerModel:
        """Call the pair's, with rows and slots rounded up."""
        self._order.begin()
        self._rows = len(prompts)
        self._next_position = max(map(len, prompts))
        padded = max(x.tokens for x in beginnings) + room_beyond(prompts, beginnings)
        self._slots = bucket_slots(padded + max_new_tokens)
        max_rows = bucket_rows(max(max_rows, self._rows))
        hidden = self.pair.resume(prompts, beginnings, self._slots - padded, max_rows, chunk)
        if bucket_rows(self._rows) > self._rows:
            self.reorder(torch.arange(self._rows, device=self.device))
        self._order.end()
        return hidden

    def take(self, row: int, tokens: int, hidden: PerModel) -> KeptRow:
        """Call the pair's; the rows that are computed end with padding."""
        self._order.begin()
        kept = self.pair.take(row, tokens, hidden)
        self._order.end()
        return kept

    def logits(self, hidden: Sequence[Tensor]) -> PerModel:
        """Call the pair's."""
        return self.pair.logits(hidden)

    def reorder(self, index: Tensor) -> None:
        """Call the pair's, with padding rows."""
        self._order.begin()
        self._rows = len(index)
        copies = index[:1].expand(bucket_rows(self._rows) - self._rows)
        self.pair.reorder(torch.cat([index, copies]))
        self._order.end()

    def most_new(self, rows: int) -> int:
        """Call the pair's, for the rows that are computed."""
        return self.pair.most_new(bucket_rows(rows))

    def set_back(self, tokens: Tensor) -> None:
        """Call the pair's, with padding rows."""
        self._order.begin()
        copies = tokens[:1].expand(bucket_rows(self._rows) - self._rows)
        self.pair.set_back(torch.cat([tokens, copies]))
        self._next_position = self.pair.longest
        self._order.end()

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> PerModel:
        """Do the pair's step; the next step overwrites the logits."""
        self._order.begin()
        new = 1 if tokens.ndim == 1 else tokens.shape[1]
        kv_length = min(bucket_slots(self._next_position + new), self._slots)
        self._next_position += new
        rows = bucket_rows(self._rows)
        any_length = self.pair.lengths_on_device
        key = (rows, new, 0, 0) if any_length else (rows, new, self._slots, kv_length)
        run = partial(self.pair.step, kv_length=kv_length)
        logits = self._recordings.step(key, tokens, run, self.pair.memory_key)
        self._order.end()
        return tuple(x[: self._rows] for x in logits)

    def warmup(self, rows: int, length: int) -> None:
        """Capture every step that `rows` sequences of up to `length` tokens can need."""
        tokens = torch.zeros(rows, dtype=torch.int64, device=self.device)
        slots = SLOTS
        while slots <= bucket_slots(length):
            self.prefill([[0]] * rows, slots - 1)
            kv_length = slots if self.pair.lengths_on_device else SLOTS
            while kv_length <= slots:
                self._next_position = kv_length - 1  # as if so many tokens had come before
                self.step(tokens)
                kv_length *= 2
            slots *= 2


def decoder(pair: ModelPair) -> Decoder:
    """Return what decodes the pair fastest on its device."""
    return GraphedRunner(pair) if pair.device.type == "cuda" else pair


def warmup(decoder: Decoder, rows: int, length: int) -> None:
    """Do once what `rows` sequences of up to `length` tokens can need."""
    if isinstance(decoder, GraphedRunner):
        return decoder.warmup(rows, length)
    decoder.prefill([[0]] * rows, 1)
    decoder.step(torch.zeros(rows, dtype=torch.int64, device=decoder.device))
    return None
