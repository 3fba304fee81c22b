"""`svd-engine explain`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from svd_engine.cli import engines, terminal
from svd_engine.cli.options import Adapter, Base, Device, DType, Strength, TrustRemoteCode, Weights


def explain(
    prompts: Annotated[Path, typer.Argument(help="JSON lines: prompt, or messages.")],
    page: Annotated[Path, typer.Argument(help="The HTML file to write.")],
    adapter: Adapter,
    base: Base = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum tokens per answer.")] = 64,
    limit: Annotated[int | None, typer.Option(help="Explain only the first prompts.")] = None,
    strength: Strength = None,
    alpha: Annotated[float | None, typer.Option(help="Replaces the calibrated alpha.")] = None,
    dtype: DType = "float32",
    weights: Weights = None,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a page that shows, token by token, what steering does to the answers to prompts.

    One HTML file with everything in it. In bfloat16 near ties may differ from the decoded text.
    """
    from svd_engine.explain import collect, write
    from svd_engine.utils.files import check_place

    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be >= 1; got {max_new_tokens}.")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be >= 1; got {limit}.")
    questions = write.read(prompts)[:limit]
    check_place(page)
    if page.is_dir():
        raise ValueError(f"{page} is a folder; name an HTML file in it.")
    steering = collect.check(engines.steering_beside(adapter, strength, alpha))
    engine = engines.load(adapter, base, dtype, device, trust_remote_code, weights, steering)
    write.write(
        engine, questions, page, max_new_tokens, adapter=adapter, progress=sys.stderr.isatty()
    )
    size = page.stat().st_size / 1e6
    terminal.say(f"{len(questions)} prompts in {page}, {size:.1f} MB: open it in a browser.")
