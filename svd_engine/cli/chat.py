"""`svd-engine chat`: a conversation in the terminal."""

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from svd_engine.cli import engines, terminal
from svd_engine.cli.options import (
    Adapter,
    Base,
    Device,
    DType,
    Strength,
    TrustRemoteCode,
    Weights,
)
from svd_engine.cli.settings import parse


def chat(
    adapter: Adapter,
    base: Base = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum tokens per answer.")] = 256,
    strength: Strength = None,
    alpha: Annotated[float | None, typer.Option(help="Replaces the calibrated alpha.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other option of SteeredEngine.generate, as JSON: top_p=0.9; repeatable.",
        ),
    ] = None,
    dtype: DType = "auto",
    weights: Weights = None,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to the steered model: a line is a question, its answer is streamed. Ctrl-D ends it."""
    more = parse(settings or ())
    from svd_engine.generation.sampling_params import SamplingParams

    options: dict[str, Any] = dict(max_new_tokens=max_new_tokens, temperature=temperature) | more
    SamplingParams.from_arguments(**options, seed=seed).seeds(1)
    steering = engines.steering_beside(adapter, strength, alpha)
    engine = engines.load(adapter, base, dtype, device, trust_remote_code, weights, steering)
    messages = [] if system is None else [{"role": "system", "content": system}]
    tried = [*messages, {"role": "user", "content": "?"}]  # refused now rather than at a question
    engine.stream(messages=tried, seed=seed, **options).close()
    for question in _questions():
        messages.append({"role": "user", "content": question})
        answer = ""
        for event in engine.stream(messages=messages, seed=seed, **options):
            terminal.write(event.text)
            answer += event.text
        terminal.write("\n")
        messages.append({"role": "assistant", "content": answer})


def _questions() -> Iterator[str]:
    """Lines of standard input that are not empty."""
    if sys.stdin is None:  # closed
        return
    while True:
        if sys.stdin.isatty():
            terminal.errors.print("> ", end="", style="dim")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
