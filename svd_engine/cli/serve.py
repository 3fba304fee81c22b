"""`svd-engine serve`."""

import os
from importlib.util import find_spec
from typing import Annotated

import typer

from svd_engine.cli import engines, terminal
from svd_engine.cli.options import Adapter, Base, Device, DType, Strength, TrustRemoteCode, Weights

NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    adapter: Adapter = ...,  # type: ignore[assignment]
    base: Base = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    name: Annotated[str, typer.Option(help="Name of the model in the API.")] = "svd-engine",
    strength: Strength = None,
    alpha: Annotated[float | None, typer.Option(help="Replaces the calibrated alpha.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one completion.")] = 1024,
    rows: Annotated[int, typer.Option(min=1, help="Sequences decoded at once.")] = 32,
    kv_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that the KV cache holds: rows times the longest.")
    ] = 32768,
    chunk: Annotated[
        int, typer.Option(min=1, help="Tokens of prompts that are read between two steps.")
    ] = 64,
    waiting: Annotated[int, typer.Option(min=1, help="Prompts that may wait.")] = 1024,
    max_body: Annotated[int, typer.Option(min=1, help="Most bytes of a request.")] = 1 << 20,
    timeout: Annotated[
        int, typer.Option(min=0, help="Seconds that requests have to finish at shutdown.")
    ] = 30,
    dtype: DType = "auto",
    weights: Weights = None,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve OpenAI's API. SVD_API_KEY in the environment is the key that clients have to send."""
    if missing := [module for module in NEEDED if find_spec(module) is None]:
        raise ValueError(
            f"serve needs {', '.join(missing)}; pip install 'svd-engine[serve]' installs them."
        )
    key = os.environ.get("SVD_API_KEY") or None
    from svd_engine.generation.limits import Limits
    from svd_engine.serve.app import make_app
    from svd_engine.serve.run import bound, run
    from svd_engine.serve.settings import Settings

    limits = Limits(rows=rows, tokens=kv_tokens, chunk=chunk, waiting=waiting)
    settings = Settings(name, key, max_tokens, max_body)
    changed = strength is not None or alpha is not None
    steering = engines.steering_beside(adapter, strength, alpha) if changed else None
    listener = bound(host, port)
    engine = engines.load(adapter, base, dtype, device, trust_remote_code, weights, steering)
    engine.limits = limits
    url = f"http://{host}:{listener.getsockname()[1]}/v1"
    note = "" if key else ", open to all who reach it"
    app = make_app(engine, settings)
    run(app, listener, timeout, lambda: terminal.say(f"{name} on {url}{note}"), engine.close)
