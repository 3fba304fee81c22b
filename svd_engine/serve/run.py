"""Run an app until a signal ends it."""

import uvicorn
from fastapi import FastAPI


def run(app: FastAPI, host: str, port: int, timeout: int) -> None:
    """Serve until Ctrl-C or SIGTERM; then take no connections, and let requests finish.

    timeout: seconds that they have; the app then ends those that are left.
    """
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=timeout)
