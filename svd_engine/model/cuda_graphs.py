"""The decode step as CUDA graphs: one a bucket of rows and slots, replayed for every token."""

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
    """A recorded step: fill `tokens`, call `replay`, read `logits`."""

    tokens: Tensor
    replay: Replay
    logits: PerModel


def bucket_rows(rows: int) -> int:
    return next((size for size in ROWS if size >= rows), rows)


def bucket_slots(slots: int) -> int:
    return SLOTS << ((slots - 1) // SLOTS).bit_length()


def record(run: Run, device: torch.device) -> tuple[Replay, PerModel]:
    """A CUDA graph of `run`, which has run before, and the tensors that a replay fills."""
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
    """A pair whose decode steps are replayed from CUDA graphs; to its callers the same pair.

    Rows and slots are rounded up, so that requests of many shapes share few graphs; rows that
    nobody asked for copy the first. A capture that fails is told once, and steps run without.
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
        self._memory: object = None  # that the recorded steps work on
        self._rows = self._slots = self._next = 0  # of the request; the position to be written

    @property
    def device(self) -> torch.device:
        return self.pair.device

    @property
    def graphs(self) -> int | None:
        """How many steps are recorded; None if recording failed."""
        return None if self._record is None else len(self._steps)

    def prefill(self, prompts: Prompts, extra: int = 0, room: int = 0) -> PerModel:
        """As the pair's."""
        self._rows, self._next = len(prompts), max(map(len, prompts))
        self._slots = bucket_slots(self._next + extra)
        room = bucket_rows(max(room, self._rows))
        hidden = self.pair.prefill(prompts, self._slots - self._next, room)
        if bucket_rows(self._rows) > self._rows:
            self.reorder(torch.arange(self._rows, device=self.device))
        return hidden

    def logits(self, hidden: Sequence[Tensor]) -> PerModel:
        """As the pair's."""
        return self.pair.logits(hidden)

    def reorder(self, index: Tensor) -> None:
        """As the pair's."""
        self._rows = len(index)
        copies = index[:1].expand(bucket_rows(self._rows) - self._rows)
        self.pair.reorder(torch.cat([index, copies]))

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> PerModel:
        """As the pair's; the logits are good until the next step."""
        live = min(bucket_slots(self._next + 1), self._slots)
        self._next += 1
        if self._memory != self.pair.memory:
            self._memory = self.pair.memory
            self._steps.clear()
        key = bucket_rows(self._rows), self._slots, live
        step = self._steps.get(key)
        if step is None:
            logits = self._first(key, tokens)
        else:
            step.tokens[: self._rows] = tokens
            step.replay()
            logits = step.logits
        return tuple(x[: self._rows] for x in logits)

    def _first(self, key: tuple[int, int, int], tokens: Tensor) -> PerModel:
        """A step without a graph, which is then recorded."""
        rows, _, live = key
        padded = tokens.new_zeros(rows)
        padded[: self._rows] = tokens

        def run() -> PerModel:
            return self.pair.step(padded, live)

        logits = run()
        if self._record is not None and rows <= ROWS[-1]:
            try:
                self._steps[key] = Step(padded, *self._record(run, self.device))
            except Exception as error:  # whatever a model does that a graph cannot hold
                self._record = None
                logger.warning("Decoding without CUDA graphs, because a capture failed: %s", error)
        return logits

    def warmup(self, rows: int, length: int) -> None:
        """Record every step that `rows` sequences of up to `length` tokens can need."""
        tokens = torch.zeros(rows, dtype=torch.int64, device=self.device)
        slots = SLOTS
        while slots <= bucket_slots(length):
            self.prefill([[0]] * rows, slots - 1)
            live = SLOTS
            while live <= slots:
                self._next = live - 1  # as if so many tokens had come before
                self.step(tokens)
                live *= 2
            slots *= 2


def decoder(pair: ModelPair) -> Decoder:
    """What decodes the pair fastest on its device."""
    return GraphedRunner(pair) if pair.device.type == "cuda" else pair
