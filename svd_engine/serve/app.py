"""The server: OpenAI's endpoints over an engine's scheduler."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

from svd_engine.engine import MODELS, SteeredEngine
from svd_engine.serve import errors
from svd_engine.serve.answers import Events, whole
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
        stream, scores = await run_in_threadpool(submit, engine, settings, asked)
        form = Form(asked, stream.request, scores, tokenizer, asked.model or settings.name)
        if asked.stream:
            return Events(stream, metrics, form)
        return await whole(http, stream, metrics, form)

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
