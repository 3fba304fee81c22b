"""The response to a completion's request: whole, or as server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from svd_engine.generation.outputs import Event
from svd_engine.generation.scheduler import ClosedError
from svd_engine.generation.stream import Stream
from svd_engine.serve import errors
from svd_engine.serve.forms import Form
from svd_engine.serve.metrics import Metrics


class Events(StreamingResponse):
    """An answer as it comes. Whoever leaves cancels the request, even before the first event."""

    def __init__(self, stream: Stream, metrics: Metrics, form: Form) -> None:
        super().__init__(self._chunks(form), media_type="text/event-stream")
        self._stream, self._metrics = stream, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._metrics.counted(self._stream):
            await super().__call__(scope, receive, send)

    async def _chunks(self, form: Form) -> AsyncIterator[str]:
        """Yield server-sent events. An error comes as the last of them."""
        try:
            async for event in self._metrics.watch(self._stream):
                yield _data(form.chunk(event))
        except Exception as error:
            yield _data(errors.body(*errors.of(error)))
            return
        if form.has_usage:
            yield _data(form.last_chunk())
        yield "data: [DONE]\n\n"


async def whole(http: Request, stream: Stream, metrics: Metrics, form: Form) -> Response:
    """Wait for all events, and answer with one object; stop when the client disconnects."""
    with metrics.counted(stream):
        answering = asyncio.ensure_future(_all_events(stream, metrics))
        leaving = asyncio.ensure_future(_gone(http))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                return Response(status_code=499)  # nobody reads it
            return _json(form.whole(answering.result(), stream.finished()))
        except ClosedError as error:
            return errors.response(*errors.of(error))
        finally:
            for task in (answering, leaving):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task


async def _all_events(stream: Stream, metrics: Metrics) -> list[list[Event]]:
    """The events of each sequence."""
    by_row: list[list[Event]] = [[] for _ in stream.request.sequences]
    async for event in metrics.watch(stream):
        by_row[event.row].append(event)
    return by_row


async def _gone(http: Request) -> None:
    """Wait until the client has disconnected."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _json(value: dict) -> Response:
    return Response(json.dumps(value), media_type="application/json")


def _data(value: dict) -> str:
    return f"data: {json.dumps(value)}\n\n"
