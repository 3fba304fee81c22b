"""`svd-engine export`."""

from pathlib import Path
from typing import Annotated

import typer

from svd_engine.cli import engines, terminal
from svd_engine.cli.options import Adapter, Base, DType, Strength, TrustRemoteCode

TARGETS = ("transformers", "vllm")


def export(
    folder: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    adapter: Adapter,
    base: Base = None,
    target: Annotated[
        str, typer.Option("--for", help=f"What will load the folder: {' or '.join(TARGETS)}.")
    ] = "transformers",
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the base's weights instead of linking to them.")
    ] = False,
    strength: Strength = None,
    alpha: Annotated[float | None, typer.Option(help="Replaces the calibrated alpha.")] = None,
    dtype: DType = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a folder of base, adapter and steering that other programs load, and decode steered.

    For transformers: transformers serve FOLDER --trust-remote-code.
    For vLLM: vllm serve FOLDER, with svd-engine installed beside it.
    """
    if target not in TARGETS:
        raise ValueError(f"--for must be {' or '.join(TARGETS)}; got {target!r}.")
    from dataclasses import replace

    from svd_engine import hub, loading
    from svd_engine.integrations import export
    from svd_engine.integrations.vllm.export import export_folder
    from svd_engine.steering_config import Steering

    export.check(folder)
    source = hub.adapter_folder(adapter)
    has_steering = loading.has_steering(source)
    steering = Steering.from_pretrained(source) if has_steering else Steering()
    steering = replace(
        steering, generation=engines.steering_of(steering.generation, strength, alpha)
    )
    base = loading.base_of(source, base)
    if target == "vllm":
        if dtype != "auto" or trust_remote_code:
            raise ValueError(
                "--dtype and --trust-remote-code are for --for transformers; vllm serve takes its "
                "own."
            )
        export_folder(folder, base, source, steering, copy=copy)
        terminal.say(f"Written to {folder}: vllm serve {folder}")
        return
    export.export(
        folder, base, source, steering, copy=copy, dtype=dtype, trust_remote_code=trust_remote_code
    )
    terminal.say(f"Written to {folder}: transformers serve {folder} --trust-remote-code")
