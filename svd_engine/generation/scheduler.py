"""Continuous batching: requests join and leave a running batch between steps."""

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from svd_engine.generation.call_lock import CallLock
from svd_engine.generation.limits import Limits
from svd_engine.generation.outputs import Event
from svd_engine.generation.prefix_cache import Holder, PrefixCache
from svd_engine.generation.reading import Reading
from svd_engine.generation.request import Request
from svd_engine.generation.row_groups import Row, choose
from svd_engine.generation.stream import Stream
from svd_engine.model.continuous import ContinuousBatch
from svd_engine.model.pair import Decoder, ModelPair


class BusyError(RuntimeError):
    """Too many prompts wait."""


class ClosedError(RuntimeError):
    """The scheduler takes no requests any more, or has ended this one."""


@dataclass(eq=False)
class Arrival:
    """A prompt, and the rows that will continue it."""

    rows: list[Row]
    slots: int = 0  # positions of each row, to its last token

    @property
    def prompt_ids(self) -> list[int]:
        return self.rows[0].sequence.prompt_ids

    @property
    def contrast_ids(self) -> list[int] | None:
        return self.rows[0].sequence.contrast_ids

    @property
    def longest(self) -> int:
        """Tokens of the prompt, or of what the base reads instead if that is longer."""
        return max(len(self.prompt_ids), len(self.contrast_ids or ()))


class Scheduler:
    """One thread that decodes the requests of an engine as one batch, first come first served.

    Each round reads at most a chunk of the prompts that wait, and takes a step of what runs.
    lock: held in each round, so that other calls of the engine come between two rounds. decoder:
    of the pair in those calls, with which texts in the cache belong.
    """

    def __init__(
        self,
        pair: ModelPair,
        decoder: Decoder,
        lock: CallLock,
        limits: Limits,
        virtual_tokens: int,
        prefix_cache: PrefixCache,
    ) -> None:
        self.limits = limits
        self._decoder, self._prefix_cache = decoder, prefix_cache
        self._pair, self._lock, self._virtual_tokens = pair, lock, virtual_tokens
        self._batch, self._reader = ContinuousBatch(pair), pair.fork()
        self._waiting: deque[Arrival] = deque()
        self._read: list[Arrival] = []  # what is being read
        self._reading: Reading | None = None
        self._running: dict[Row, int] = {}  # by place, with the slots that each needs
        self._changed = threading.Condition()  # guards what waits, and the door
        self._is_closed = self._finishes = False
        self._thread = threading.Thread(target=self._run, name="svd-engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Number of sequences in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Number of prompts that wait."""
        return len(self._waiting)

    @property
    def is_open(self) -> bool:
        """Whether it takes requests."""
        return not self._is_closed and self._thread.is_alive()

    def submit(self, request: Request) -> Stream:
        """Let a request wait for its turn. Raises ValueError for one that would never fit."""
        alone = {"speculate": request.speculation, "prefill_chunk": request.prefill_chunk}
        for name, value in alone.items():
            if value is not None:
                raise ValueError(
                    f"{name} is for a batch of its own, and submit decodes beside other requests. "
                    "Leave it out, or call generate or stream."
                )
        stream = Stream(request)
        arrivals = [*self._arrivals(stream)]
        for arrival in arrivals:
            self.limits.check(len(arrival.rows), arrival.slots)
        if len(arrivals) > self.limits.waiting:
            raise ValueError(
                f"{len(arrivals)} prompts in one request; at most {self.limits.waiting} may wait."
            )
        with self._changed:
            if not self.is_open:
                raise ClosedError("the engine was closed, or made before this process was forked.")
            if self.waiting + len(arrivals) > self.limits.waiting:
                raise BusyError(f"{self.waiting} prompts wait already; try again later.")
            self._waiting.extend(arrivals)
            self._changed.notify()
        return stream

    def close(self, finish: bool = False) -> None:
        """Take no more requests; finish those that are there, or end them with ClosedError."""
        with self._changed:
            self._is_closed, self._finishes = True, finish
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _arrivals(self, stream: Stream) -> Iterable[Arrival]:
        copies = stream.request.sampling.num_return_sequences
        rows = [Row(sequence, stream) for sequence in stream.request.sequences]
        for i in range(0, len(rows), copies):
            sequence = rows[i].sequence
            if not sequence.is_finished:
                arrival = Arrival(rows[i : i + copies])
                arrival.slots = self._virtual_tokens + arrival.longest + sequence.max_new_tokens
                yield arrival

    def _run(self) -> None:
        while self._has_work():
            try:
                with self._lock.hold():
                    self._round()
            except Exception as error:
                self._fail(error)

    def _has_work(self) -> bool:
        """Wait for work; False if there will be none."""
        with self._changed:
            while not (self._waiting or self._read or self._running):
                if self._is_closed:
                    return False
                self._changed.wait()
        return True

    def _round(self) -> None:
        if self._is_closed and not self._finishes:
            raise ClosedError("the engine was closed.")
        self._drop_cancelled()
        if not self._read:
            self._admit()
        if self._reading is not None:
            self._read_chunk(self._reading)
        if self._running:
            self._step()

    def _fail(self, error: Exception) -> None:
        """End what runs; where nothing does, or nothing will, also what waits."""
        with self._changed:
            ended = [*self._running, *(row for arrival in self._read for row in arrival.rows)]
            if self._is_closed or not ended:
                ended += [row for arrival in self._waiting for row in arrival.rows]
                self._waiting.clear()
        self._batch, self._reader = ContinuousBatch(self._pair), self._pair.fork()
        self._running, self._read, self._reading = {}, [], None
        for stream in {row.stream for row in ended}:
            stream.cancel()
            stream.end(error)

    def _drop_cancelled(self) -> None:
        """Remove the rows whose readers have left, and prompts that have waited too long."""
        dropped = {row.stream for row in self._running if row.stream.is_cancelled}
        for row in reversed([*self._running]):
            if row.stream.is_cancelled:
                self._remove(row)
        with self._changed:
            for arrival in [a for a in self._waiting if a.rows[0].stream.is_cancelled]:
                self._waiting.remove(arrival)
                dropped.add(arrival.rows[0].stream)
            for arrival in [a for a in self._waiting if a.rows[0].request.is_over]:
                self._waiting.remove(arrival)
                for row in arrival.rows:
                    row.stream.give_up(row.sequence)
        if self._read and all(arrival.rows[0].stream.is_cancelled for arrival in self._read):
            dropped.update(arrival.rows[0].stream for arrival in self._read)
            self._read, self._reading = [], None
        for stream in dropped:
            stream.end()

    def _admit(self) -> None:
        """Begin to read prompts, in their order, as far as there is room for what follows them."""
        rows, slots, longest = self.running, max(self._running.values(), default=1), 0
        while self._waiting:
            arrival = self._waiting[0]
            more, long = rows + len(arrival.rows), max(slots, arrival.slots)
            longest = max(longest, arrival.longest)
            is_too_much = self._read and (len(self._read) + 1) * longest > self.limits.chunk
            if is_too_much or not self.limits.fits(more, long):
                break
            rows, slots = more, long
            with self._changed:
                self._read.append(self._waiting.popleft())
        if not self._read:
            return
        batch = self._batch
        if rows > batch.rows or slots > batch.slots:
            batch.resize(*self.limits.room(rows, slots, (batch.rows, batch.slots)))
        prompts = [arrival.prompt_ids for arrival in self._read]
        contrast = beginnings = None
        if any(arrival.contrast_ids for arrival in self._read):
            contrast = [arrival.contrast_ids or arrival.prompt_ids for arrival in self._read]
        else:
            beginnings = self._prefix_cache.find(self._decoder, prompts)
        how = prompts, beginnings, contrast, self.limits.chunk
        self._reading = Reading(self._reader, *how)

    @torch.inference_mode()
    def _read_chunk(self, reading: Reading) -> None:
        """Read on; after the last chunk choose the first tokens, and let the rows join."""
        logits = reading.advance()
        if logits is None:
            return
        arrivals, self._read, self._reading = self._read, [], None
        rows = [(row, i, a.slots) for i, a in enumerate(arrivals) for row in a.rows]
        index = torch.tensor([i for _, i, _ in rows], device=logits[0].device)
        events = choose([row for row, _, _ in rows], tuple(x[index] for x in logits))
        for (row, i, slots), event in zip(rows, events, strict=True):
            row.hidden = tuple(h[i] for h in reading.hidden)
            self._deliver(row, event)
            if not row.is_over:
                self._batch.join(self._reader, i)
                self._running[row] = slots
                continue
            if row.sequence.is_finished:
                self._keep(row, self._reader, i)
            if row.stream.is_cancelled:
                row.stream.end()

    @torch.inference_mode()
    def _step(self) -> None:
        """Choose a token for each row that runs; remove the rows that are finished."""
        rows = [*self._running]
        latest = [row.sequence.token_ids[-1] for row in rows]
        logits = self._batch.step(torch.tensor(latest, device=self._pair.device))
        events = choose(rows, logits)
        for row, event in zip(rows, events, strict=True):
            self._deliver(row, event)
        for row, event in zip(reversed(rows), reversed(events), strict=True):
            if isinstance(event, Exception) or row.sequence.is_finished:
                self._remove(row, is_finite=not isinstance(event, Exception))

    def _deliver(self, row: Row, event: Event | Exception) -> None:
        if isinstance(event, Exception):
            row.stream.cancel()
            row.stream.end(event)
        else:
            row.stream.put(event)

    def _keep(self, row: Row, holder: Holder, place: int) -> None:
        """Keep what a finished row has read, for prompts that begin like it."""
        sequence = row.sequence
        if sequence.contrast_ids is None:
            self._prefix_cache.keep(self._decoder, place, sequence, row.hidden, holder)

    def _remove(self, row: Row, is_finite: bool = True) -> None:
        """Take a row out of the batch; the last one takes its place."""
        rows = [*self._running]
        place = rows.index(row)
        if row.sequence.is_finished:
            self._keep(row, self._batch, place)
        self._batch.leave(place, is_finite)
        last = rows.pop()
        if last is not row:
            rows[place] = last
        self._running = {row: self._running[row] for row in rows}
