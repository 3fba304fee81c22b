"""The server: OpenAI's endpoints over an engine's scheduler."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

from svd_engine.engine import MODELS, SteeredEngine
from svd_engine.generation.outputs import Event
from svd_engine.generation.scheduler import ClosedError
from svd_engine.generation.stream import Stream
from svd_engine.serve import errors
from svd_engine.serve.forms import Form
from svd_engine.serve.gate import Gate
from svd_engine.serve.metrics import Metrics
from svd_engine.serve.schemas import ChatRequest, CompletionRequest, TokenizeRequest
from svd_engine.serve.settings import Settings
from svd_engine.serve.submit import prompt_ids, submit


def make_app(engine: SteeredEngine, settings: Settings) -> FastAPI:
    """Build the app. It closes the engine when it ends. Raises ValueError without a tokenizer."""
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise ValueError("a server needs a tokenizer; pass one to the engine.")
    scheduler, created = engine.scheduler, int(time.time())
    metrics = Metrics(scheduler)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)  # what still runs is told so

    app = FastAPI(title="svd-engine", lifespan=lifespan)
    app.add_middleware(Gate, api_key=settings.api_key, max_body=settings.max_body)
    errors.install(app)

    async def answer(asked: ChatRequest | CompletionRequest, http: Request) -> Response:
        stream = await run_in_threadpool(submit, engine, settings, asked)
        form = Form(asked, stream.request, tokenizer, asked.model or settings.name)
        if asked.stream:
            chunks = sse(asked, metrics.watch(stream), form)
            return StreamingResponse(chunks, media_type="text/event-stream")
        return await unless_gone(http, whole(stream, metrics.watch(stream), form))

    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, http: Request) -> Response:
        return await answer(asked, http)

    @app.post("/v1/chat/completions")
    async def chat_completions(asked: ChatRequest, http: Request) -> Response:
        return await answer(asked, http)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = (settings.name, *MODELS)
        return dict(
            object="list",
            data=[
                dict(id=x, object="model", created=created, owned_by="svd-engine") for x in names
            ],
        )

    @app.post("/tokenize")
    async def tokenize(asked: TokenizeRequest) -> dict[str, Any]:
        try:
            if (asked.prompt is None) == (asked.messages is None):
                raise ValueError("give prompt or messages, one of the two.")
            ids = (await run_in_threadpool(prompt_ids, engine, asked))[0]
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        return dict(tokens=ids, count=len(ids))

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not scheduler.is_open:
            raise HTTPException(503, "the engine is closed.")
        return dict(status="ok")

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    return app


async def whole(stream: Stream, events: AsyncIterator[Event], form: Form) -> Response:
    """Wait for all events, and answer with one object."""
    by_row: list[list[Event]] = [[] for _ in stream.request.sequences]
    try:
        async for event in events:
            by_row[event.row].append(event)
    except ClosedError as error:
        return errors.response(503, str(error))
    return _json(form.whole(by_row, stream.finished()))


async def sse(
    asked: ChatRequest | CompletionRequest, events: AsyncIterator[Event], form: Form
) -> AsyncIterator[str]:
    """Yield server-sent events. An error comes as the last of them."""
    try:
        async for event in events:
            yield _data(form.chunk(event))
    except Exception as error:
        status = 503 if isinstance(error, ClosedError) else 500
        yield _data(errors.body(status, str(error)))
        return
    finally:
        await events.aclose()  # type: ignore[attr-defined]
    if asked.stream_options is not None and asked.stream_options.include_usage:
        yield _data(form.last_chunk())
    yield "data: [DONE]\n\n"


async def unless_gone(http: Request, work: Awaitable[Response]) -> Response:
    """Await the work, but cancel it when the client disconnects."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return Response(status_code=499)  # nobody reads it
    finally:
        for task in (working, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


def _json(value: dict) -> Response:
    return Response(json.dumps(value), media_type="application/json")


def _data(value: dict) -> str:
    return f"data: {json.dumps(value)}\n\n"
