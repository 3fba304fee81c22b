"""`svd-engine warm-start`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from svd_engine.cli import terminal
from svd_engine.cli.options import Device, TrustRemoteCode


def warm_start(
    train: Annotated[Path, typer.Argument(help="JSON lines: prompt, completion; or messages.")],
    output: Annotated[Path, typer.Argument(help="Folder of the new adapter.")],
    base: Annotated[
        str, typer.Option(help='Base model: a folder, a Hub name or "smollm2".')
    ] = "smollm2",
    method: Annotated[str, typer.Option(help="lora, ia3, prompt, p-tuning or prefix.")] = "lora",
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 8,
    lora_alpha: Annotated[float, typer.Option(help="LoRA alpha; the scale is alpha / rank.")] = 16,
    dropout: Annotated[float, typer.Option(help="LoRA dropout.")] = 0.1,
    virtual_tokens: Annotated[
        int, typer.Option(help="Virtual tokens of prompt, p-tuning and prefix.")
    ] = 20,
    steps: Annotated[int | None, typer.Option(help="Training steps; overrides --epochs.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the training file.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Answers per batch.")] = 16,
    accumulation: Annotated[int, typer.Option(help="Batches per step.")] = 1,
    learning_rate: Annotated[
        str | None,
        typer.Option(
            help="auto suits a short run: lora 5e-4, ia3 5e-3, prompt, p-tuning and prefix 1e-2. "
            "By default auto for up to 200 steps, and the paper's 5e-5 for more."
        ),
    ] = None,
    max_length: Annotated[int, typer.Option(help="Maximum tokens of prompt and answer.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the new weights and the order of answers.")] = 0,
    checkpoint_every: Annotated[
        int,
        typer.Option(help="Steps between checkpoints; the same command resumes from the last one."),
    ] = 20,
    overwrite: Annotated[
        bool, typer.Option(help="Replace the adapter in the output folder.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Dtype of the base; the adapter is float32.")] = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train an adapter briefly: the warm start that steering continues.

    The defaults are the paper's but for the learning rate. The losses are written to
    warm_start.json beside the adapter.
    """
    from svd_engine import loading
    from svd_engine.data import examples as example_files
    from svd_engine.training import checks
    from svd_engine.training.warm_start import warm_start as train_adapter

    options: dict[str, Any] = dict(
        method=method, rank=rank, lora_alpha=lora_alpha, dropout=dropout,
        virtual_tokens=virtual_tokens, steps=steps, epochs=epochs, batch_size=batch_size,
        accumulation=accumulation, learning_rate=_rate(learning_rate), max_length=max_length,
        seed=seed, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    checks.options(**options)
    checks.output(output, overwrite)
    examples = example_files.read(train)
    model, tokenizer = loading.load_base(
        base, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    folder = train_adapter(model, tokenizer, examples, output, overwrite=overwrite, **options)
    terminal.say(f"Adapter written to {folder}")


def _rate(text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text
