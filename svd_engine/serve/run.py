"""Run an app until a signal ends it."""

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress

import uvicorn
from fastapi import FastAPI

GRACE = 5  # seconds that clients have to read that their requests were ended


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that has the address, but takes no connections yet. Raises ValueError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ValueError(f"cannot listen on {host} port {port}: {error.strerror}.") from error
    return listener


class Server(uvicorn.Server):
    """Lets requests finish after a signal, and then ends what is left of them.

    seconds: that requests have. ready: called when connections are taken; close: ends requests.
    """

    def __init__(
        self, app: FastAPI, seconds: int, ready: Callable[[], None], close: Callable[[], None]
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app, log_level="warning", timeout_graceful_shutdown=seconds + GRACE, lifespan="on"
            )
        )
        self._seconds, self._ready, self._close = seconds, ready, close

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_requests())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_requests(self) -> None:
        await asyncio.sleep(self._seconds)
        await asyncio.to_thread(self._close)


def run(
    app: FastAPI,
    listener: socket.socket,
    seconds: int,
    ready: Callable[[], None],
    close: Callable[[], None],
) -> None:
    """Serve until Ctrl-C or SIGTERM, as `Server` does."""
    with suppress(KeyboardInterrupt):
        Server(app, seconds, ready, close).run([listener])
