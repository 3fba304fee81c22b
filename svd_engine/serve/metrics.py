"""Prometheus metrics of a server."""

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from svd_engine.generation.outputs import Event
from svd_engine.generation.scheduler import Scheduler
from svd_engine.generation.stream import Stream

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counts requests and tokens, and measures the times between events."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = to = CollectorRegistry()
        running = Gauge("svd_engine_running", "Sequences being decoded", registry=to)
        waiting = Gauge("svd_engine_waiting", "Prompts that wait", registry=to)
        running.set_function(lambda: scheduler.running)
        waiting.set_function(lambda: scheduler.waiting)
        self._requests = Counter("svd_engine_requests", "Requests", ["outcome"], registry=to)
        self._prompt = Counter("svd_engine_prompt_tokens", "Tokens of prompts", registry=to)
        self._tokens = Counter("svd_engine_completion_tokens", "Tokens decoded", registry=to)
        self._first = Histogram(
            "svd_engine_time_to_first_token_seconds", "From arrival", buckets=SECONDS, registry=to
        )
        self._between = Histogram(
            "svd_engine_time_between_tokens_seconds", "Per sequence", buckets=SECONDS, registry=to
        )

    @contextmanager
    def counted(self, stream: Stream) -> Iterator[None]:
        """Count the request by its outcome, in the end; cancel what is left of it."""
        sequences = stream.request.sequences
        firsts = sequences[:: stream.request.sampling.num_return_sequences]
        self._prompt.inc(sum(len(sequence.prompt_ids) for sequence in firsts))
        try:
            yield
        finally:
            stream.cancel()
            outcome = "finished" if all(x.is_finished for x in sequences) else "cancelled"
            self._requests.labels("failed" if stream.has_failed else outcome).inc()

    async def watch(self, stream: Stream) -> AsyncIterator[Event]:
        """Yield the stream's events; count and time them."""
        latest: dict[int, float] = {}
        start = time.perf_counter()
        async for event in stream:
            now = time.perf_counter()
            if event.row in latest:
                self._between.observe(now - latest[event.row])
            else:
                self._first.observe(now - start)
            latest[event.row] = now
            self._tokens.inc()
            yield event
