"""Errors in OpenAI's form."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from svd_engine.generation.scheduler import ClosedError

KINDS = {401: "authentication_error", 429: "rate_limit_error"}


def of(error: Exception) -> tuple[int, str]:
    """Status and message of what ended a request."""
    if isinstance(error, ClosedError):
        return 503, "the server is shutting down."
    return 500, f"{type(error).__name__}: {error}"


def body(status: int, message: str, param: str | None = None) -> dict:
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def response(status: int, message: str, param: str | None = None) -> JSONResponse:
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse(body(status, message, param), status, headers)


def install(app: FastAPI) -> None:
    """Answer every error of the app in this form."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        return response(400, f"{place or 'the body'}: {first['msg']}", place or None)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return response(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return response(*of(error))
