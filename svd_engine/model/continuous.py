"""A running batch that sequences join and leave between steps."""

import torch
from torch import Tensor

from svd_engine.model.cuda_graphs import Recordings, bucket_rows
from svd_engine.model.kept_rows import KeptRow, Layers
from svd_engine.model.kv_cache import KVCache
from svd_engine.model.pair import ModelPair, PairedRunner, PerModel
from svd_engine.model.runner import ModelRunner


class RunningCache(KVCache):
    """A KV cache whose rows are copied one by one, and whose size changes while it is in use."""

    def resize(self, max_rows: int, slots: int, first_row: int, rows: int) -> None:
        """Reserve other rows and slots; the batch, of `rows` rows, moves to `first_row`."""
        stored, kept, before = self._layers, min(slots, self.slots), self.first_row
        self._memory.clear()
        self._layers = {}
        self._max_rows, self.slots = max_rows, slots
        for layer in [*stored]:  # one by one, so that only one layer is there twice
            old = stored.pop(layer)
            for to, source in zip(self._layer(layer, *old), old, strict=True):
                moved = source[before : before + rows, :, :kept]
                to[first_row : first_row + rows, :, :kept] = moved
        self.begin_at(first_row)

    def begin_at(self, first_row: int) -> None:
        """Let the batch begin at a row of the memory."""
        self.first_row, self.layout = first_row, object()

    def copy_row(self, row: int, source: KVCache, source_row: int, length: int) -> None:
        """Copy the first `length` slots of a row of some cache; rows count in the memory."""
        for layer, there in source._layers.items():
            for to, buffer in zip(self._layer(layer, *there), there, strict=True):
                to[row, :, :length] = buffer[source_row, :, :length]

    def clear_row(self, row: int) -> None:
        """Fill a row with zeros: what is not finite would reach the row's next sequence."""
        for pair in self._layers.values():
            for buffer in pair:
                buffer[row] = 0


class Places:
    """The rows of one runner; a sequence has a place from 0 on.

    Of a batch [base rows, adapted rows], place i is i rows below and i rows above the middle of the
    memory. Both halves remain next to each other when a sequence joins, and nothing moves.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.runner, self.cache = runner, RunningCache()
        runner.cache = self.cache
        self._models = 2 if runner.paired else 1
        self._room = 0  # places

    def resize(self, room: int, slots: int, size: int) -> None:
        """Reserve places of `slots` positions, and keep the first `size` of them."""
        positions = self.runner.positions
        self._room = room
        first_row = self._first_row(size)
        self.cache.resize(self._models * room, slots, first_row, self._models * size)
        self.runner._position_buffer = positions.new_zeros(self._models * room)
        self.runner._position_buffer[first_row : first_row + len(positions)] = positions
        self._show(size)

    def fill(self, place: int, source: ModelRunner, sequence: int) -> None:
        """Take over a sequence of another runner of the same modules, as the last place."""
        sequences = len(source.positions) // self._models
        for half, row in enumerate(self._rows(place)):
            self._copy(row, source, sequence + half * sequences)
        self._show(place + 1)

    def vacate(self, place: int, size: int) -> None:
        """Let the last of `size` sequences take the place of the one there."""
        for row, last in zip(self._rows(place), self._rows(size - 1), strict=True):
            if row != last:
                self._copy(row, self.runner, last - self.cache.first_row)
        self._show(size - 1)

    def pad(self, size: int, rows: int) -> None:
        """Let the batch consist of `rows` places, of which those after the first `size` are free.

        What a step stores there, whatever takes the place overwrites.
        """
        firsts, lasts = self._rows(size), self._rows(rows - 1)
        for first, last in zip(firsts, lasts, strict=True):
            self.runner._position_buffer[min(first, last) : max(first, last) + 1] = 0
        self._show(rows)

    def take(self, place: int, tokens: int) -> list[Layers]:
        """Copy keys and values of the first tokens of a sequence, of each of its rows."""
        rows = self._rows(place)
        virtual = [0] * (len(rows) - 1) + [self.runner.virtual_tokens]
        return [self.cache.take(r, tokens + v) for r, v in zip(rows, virtual, strict=True)]

    def clear(self, place: int) -> None:
        for row in self._rows(place):
            self.cache.clear_row(row)

    def _copy(self, row: int, source: ModelRunner, index: int) -> None:
        """Copy what a row of a runner's batch has stored."""
        length = int(source.positions[index])
        self.cache.copy_row(row, source.cache, source.cache.first_row + index, length)
        self.runner._position_buffer[row] = length

    def _rows(self, place: int) -> tuple[int, ...]:
        """Rows of the memory: of the base and of the adapted model, or of a single one."""
        return (self._room - 1 - place, self._room + place) if self.runner.paired else (place,)

    def _first_row(self, size: int) -> int:
        return self._room - size if self.runner.paired else 0

    def _show(self, size: int) -> None:
        """Let the batch consist of the first `size` places."""
        first_row = self._first_row(size)
        rows = slice(first_row, first_row + self._models * size)
        self.runner.positions = self.runner._position_buffer[rows]
        self.cache.begin_at(first_row)


class ContinuousBatch:
    """Sequences of a pair that are decoded together.

    pair: its modules are shared, its cache is not. rows and slots: the room, in sequences and in
    positions of each. recordings: replays steps, on a GPU; free places make up the rows that a
    recorded step has.
    """

    def __init__(self, pair: ModelPair, recordings: Recordings | None = None) -> None:
        self._pair = pair.fork()
        self._places = [Places(runner) for runner in self._pair.runners]
        self.size = self.rows = self.slots = 0
        if recordings is None and pair.device.type == "cuda" and pair.lengths_on_device:
            recordings = Recordings(pair.device)
        self._recordings = recordings

    @torch.inference_mode()
    def resize(self, rows: int, slots: int) -> None:
        """Make room, at least for the sequences that are there."""
        for places in self._places:
            places.resize(rows, slots, self.size)
        self.rows, self.slots = rows, slots

    @torch.inference_mode()
    def join(self, source: ModelPair, sequence: int) -> None:
        """Add a sequence that a fork of the same pair has read, as the last one."""
        for places, runner in zip(self._places, source.runners, strict=True):
            places.fill(self.size, runner, sequence)
        self.size += 1

    @torch.inference_mode()
    def leave(self, place: int, is_finite: bool = True) -> None:
        """Remove a sequence; the last one takes its place. is_finite: what it has stored."""
        for places in self._places:
            if not is_finite:
                places.clear(place)
            places.vacate(place, self.size)
        self.size -= 1

    @torch.inference_mode()
    def take(self, place: int, tokens: int, hidden: PerModel) -> KeptRow:
        """Keep the first tokens of a sequence's text. hidden: after its prompt, `[H]` each."""
        taken = (layers for places in self._places for layers in places.take(place, tokens))
        return KeptRow(tuple(taken), hidden)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> PerModel:
        """Return logits of (adapted, base) after one more token per sequence, `[B, V]` each.

        The next step may overwrite them.
        """
        if self._recordings is None:
            return self._step(tokens)
        rows = min(bucket_rows(self.size), self.rows)
        if rows > self.size:
            for places in self._places:
                places.pad(self.size, rows)
        key = (rows, 1, 0, 0)
        logits = self._recordings.step(key, tokens, self._step, self._pair.memory_key)
        return tuple(x[: self.size] for x in logits)

    def _step(self, tokens: Tensor) -> PerModel:
        if not isinstance(self._pair, PairedRunner):
            return self._pair.step(tokens)
        base, adapted = self._pair.runner.step(torch.cat([tokens.flip(0), tokens])).chunk(2)
        return adapted, base.flip(0)
