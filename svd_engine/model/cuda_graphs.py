"""Decode steps as CUDA graphs, one per bucket of rows and slots, replayed for every token."""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from svd_engine.model.pair import Decoder, ModelPair, PerModel, Prompts

logger = logging.getLogger(__name__)

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # more rows decode without a graph
SLOTS = 256  # and twice, four times, ... as many

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


def record(run: Run, device: torch.device) -> tuple[Replay, PerModel]:
    """Capture `run`, which has run before. Return the replay and the tensors that it fills."""
    with torch.cuda.device(device):
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        state, graph = generator.clone_state(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = run()
        except Exception:
            generator.graphsafe_set_state(state)  # a capture that fails leaves it unusable
            raise
    return graph.replay, outputs


class GraphedRunner:
    """A `Decoder` that replays a pair's decode steps from CUDA graphs.

    Rows and slots are rounded up, so that requests of many shapes share few graphs. Padding rows
    duplicate row 0. If a capture fails, one warning is logged and decoding goes on without graphs.
    """

    overlaps_host = True

    def __init__(
        self,
        pair: ModelPair,
        record: Callable[[Run, torch.device], tuple[Replay, PerModel]] = record,
    ) -> None:
        self.pair = pair
        self._record: Callable[[Run, torch.device], tuple[Replay, PerModel]] | None = record
        self._steps: dict[tuple[int, int, int], Step] = {}
        self._memory_key: object = None  # of the tensors that the captured steps work on
        self._rows = self._slots = 0  # of the request
        self._next_position = 0  # the highest that the next step writes

    @property
    def device(self) -> torch.device:
        return self.pair.device

    @property
    def graphs(self) -> int | None:
        """Number of captured steps; None if a capture failed."""
        return None if self._record is None else len(self._steps)

    def prefill(self, prompts: Prompts, max_new_tokens: int = 0, max_rows: int = 0) -> PerModel:
        """Call the pair's, with rows and slots rounded up."""
        self._rows, self._next_position = len(prompts), max(map(len, prompts))
        self._slots = bucket_slots(self._next_position + max_new_tokens)
        max_rows = bucket_rows(max(max_rows, self._rows))
        hidden = self.pair.prefill(prompts, self._slots - self._next_position, max_rows)
        if bucket_rows(self._rows) > self._rows:
            self.reorder(torch.arange(self._rows, device=self.device))
        return hidden

    def logits(self, hidden: Sequence[Tensor]) -> PerModel:
        """Call the pair's."""
        return self.pair.logits(hidden)

    def reorder(self, index: Tensor) -> None:
        """Call the pair's, with padding rows."""
        self._rows = len(index)
        copies = index[:1].expand(bucket_rows(self._rows) - self._rows)
        self.pair.reorder(torch.cat([index, copies]))

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> PerModel:
        """Do the pair's step; the next step overwrites the logits."""
        kv_length = min(bucket_slots(self._next_position + 1), self._slots)
        self._next_position += 1
        if self._memory_key != self.pair.memory_key:
            self._memory_key = self.pair.memory_key
            self._steps.clear()
        key = bucket_rows(self._rows), self._slots, kv_length
        step = self._steps.get(key)
        if step is None:
            logits = self._run_and_capture(key, tokens)
        else:
            step.tokens[: self._rows] = tokens
            step.replay()
            logits = step.logits
        return tuple(x[: self._rows] for x in logits)

    def _run_and_capture(self, key: tuple[int, int, int], tokens: Tensor) -> PerModel:
        """Do a step without a graph, then capture it."""
        rows, _, kv_length = key
        padded = tokens.new_zeros(rows)
        padded[: self._rows] = tokens

        def run() -> PerModel:
            return self.pair.step(padded, kv_length)

        logits = run()
        if self._record is not None and rows <= ROWS[-1]:
            try:
                self._steps[key] = Step(padded, *self._record(run, self.device))
            except Exception as error:  # a graph cannot hold all that a model may do
                self._record = None
                logger.warning("Decoding without CUDA graphs, because a capture failed: %s", error)
        return logits

    def warmup(self, rows: int, length: int) -> None:
        """Capture every step that `rows` sequences of up to `length` tokens can need."""
        tokens = torch.zeros(rows, dtype=torch.int64, device=self.device)
        slots = SLOTS
        while slots <= bucket_slots(length):
            self.prefill([[0]] * rows, slots - 1)
            kv_length = SLOTS
            while kv_length <= slots:
                self._next_position = kv_length - 1  # as if so many tokens had come before
                self.step(tokens)
                kv_length *= 2
            slots *= 2


def decoder(pair: ModelPair) -> Decoder:
    """Return what decodes the pair fastest on its device."""
    return GraphedRunner(pair) if pair.device.type == "cuda" else pair
