"""The `svd-engine` command."""

import logging
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from svd_engine import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
INTERRUPTED = 130  # what typer makes of Ctrl-C
console = Console()
errors = Console(stderr=True)

Base = Annotated[str, typer.Option(help='Base model: a folder, a Hub name or "smollm2".')]
Adapter = Annotated[Path, typer.Option(help="Folder of the PEFT adapter.")]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]


def _version(show: bool) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and stop.")
    ] = False,
    verbose: Annotated[bool, typer.Option(help="Say more; show where an error came from.")] = False,
) -> None:
    """Decode with a steering vector at the price of plain decoding."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")
    _quiet(verbose)


@app.command("warm-start")
def warm_start(
    train: Annotated[Path, typer.Argument(help="JSON lines: prompt, completion; or messages.")],
    output: Annotated[Path, typer.Argument(help="Folder of the new adapter.")],
    base: Base = "smollm2",
    method: Annotated[str, typer.Option(help="lora, ia3, prompt, p-tuning or prefix.")] = "lora",
    steps: Annotated[int | None, typer.Option(help="Training steps; wins over --epochs.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the training file.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Answers a step.")] = 16,
    learning_rate: Annotated[
        float | None, typer.Option(help="By default what suits the method.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of prompt and answer at most.")] = 512,
    seed: int = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the base; the adapter is float32.")] = "bfloat16",
    device: Device = "cpu",
) -> None:
    """Train an adapter a little: the warm start that steering continues."""
    from svd_engine import examples, models
    from svd_engine.warm_start import warm_start as train_adapter

    rows = examples.read(train)
    model, tokenizer = models.load_base(base, dtype=dtype, device=device)
    folder = train_adapter(
        model, tokenizer, rows, output, method=method, steps=steps, epochs=epochs,
        batch_size=batch_size, learning_rate=learning_rate, max_length=max_length, seed=seed,
        overwrite=overwrite,
    )  # fmt: skip
    console.print(f"Adapter written to {folder}")


@app.command()
def calibrate(
    adapter: Annotated[Path, typer.Argument(help="Folder of the PEFT adapter.")],
    data: Annotated[Path, typer.Argument(help="JSON lines: prompt, completion, rejected.")],
    base: Base = "smollm2",
    objective: Annotated[
        str | None,
        typer.Option(help="preference or nll; by default preference where lines have rejected."),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Confidence a token needs to be steered.")] = 0.1,
    folds: Annotated[int, typer.Option(help="Parts of the cross-validation.")] = 5,
    seed: int = 0,
    force: Annotated[bool, typer.Option(help="Keep the strength though it gains nothing.")] = False,
    dtype: DType = "auto",
    device: Device = "cpu",
) -> None:
    """Find the strength, say what it is worth, write steering_config.json beside the adapter."""
    from svd_engine import examples, models, show
    from svd_engine.engine import SteeredEngine

    rows = examples.read(data)
    model, tokenizer = models.load_base(base, dtype=dtype, device=device)
    engine = SteeredEngine(models.load_adapter(model, adapter), tokenizer)
    report = engine.calibrate(
        rows, objective=objective, alpha=alpha, folds=folds, seed=seed, force=force, progress=True
    )
    assert engine.steering is not None
    report.save(adapter)
    path = engine.steering.save_pretrained(adapter)
    console.print(show.calibration(report))
    if not report.worthwhile and not force:
        console.print("Strength 0 is written; --force keeps the estimate.")
    console.print(f"Written to {path}")


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="By default standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file of prompts, one a line.")] = None,
    adapter: Adapter = ...,  # type: ignore[assignment]
    base: Base = "smollm2",
    compare: Annotated[bool, typer.Option(help="Show base, adapted and steered.")] = False,
    chat: Annotated[bool, typer.Option(help="Put each prompt into the chat template.")] = False,
    max_new_tokens: int = 128,
    strength: Annotated[float | None, typer.Option(help="In place of the calibrated one.")] = None,
    alpha: Annotated[float | None, typer.Option(help="In place of the calibrated one.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    dtype: DType = "auto",
    device: Device = "cpu",
) -> None:
    """Complete prompts, steered, streamed to the terminal."""
    texts = _prompts(prompts, file)
    from svd_engine.engine import SteeredEngine

    engine = SteeredEngine.from_pretrained(base, adapter, dtype=dtype, device=device)
    engine.steering = _steering(engine.steering, strength, alpha)
    sampling = dict(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, seed=seed,
    )  # fmt: skip
    for text in texts:
        shown = _chat(engine.tokenizer, text) if chat else text
        if len(texts) > 1 or compare:
            console.rule(text.strip().replace("\n", " ")[:70], align="left", style="dim")
        for model in ("base", "adapted", "steered") if compare else ("steered",):
            if compare:
                console.print(f"{model:8}", style="bold", end="")
            _stream(engine, shown, model, sampling)


@app.command()
def env() -> None:
    """Versions, devices and backends, with the reason where one is not available."""
    from svd_engine import show

    console.print(show.environment())


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the run is kept.")] = Path("runs/demo"),
    fresh: Annotated[bool, typer.Option(help="Train again instead of using the adapter.")] = False,
) -> None:
    """The whole path on SmolLM2-135M: warm start, calibrate, rank, generate, compare."""
    from svd_engine.demo import run

    run(folder, console, fresh=fresh)


def _prompts(prompts: list[str] | None, file: Path | None) -> list[str]:
    if prompts and file:
        raise ValueError("give prompts as arguments or with --file, not both.")
    if file is not None:
        if not file.is_file():
            raise ValueError(f"--file {file} does not exist.")
        prompts = file.read_text(encoding="utf-8").splitlines()
    elif not prompts:
        if sys.stdin.isatty():
            errors.print("Prompts from standard input, one a line; end with Ctrl-D.", style="dim")
        prompts = sys.stdin.read().splitlines()
    texts = [prompt.replace("\\n", "\n") for prompt in prompts if prompt.strip()]
    if not texts:
        raise ValueError("no prompts came; give them as arguments, with --file or on stdin.")
    return texts


def _steering(config, strength, alpha):
    from dataclasses import replace

    from svd_engine.steering import SteeringConfig

    if config is None and strength is None:
        raise ValueError(
            "the adapter has no steering_config.json; run svd-engine calibrate or give --strength."
        )
    config = config or SteeringConfig(0.0)
    changes = {k: v for k, v in (("strength", strength), ("alpha", alpha)) if v is not None}
    return replace(config, **changes)


def _chat(tokenizer, text: str) -> str:
    if tokenizer.chat_template is None:
        raise ValueError("the model has no chat template; leave out --chat.")
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)


def _stream(engine, prompt: str, model: str, sampling: dict) -> None:
    times = [time.perf_counter()]
    for event in engine.stream(prompt, model=model, **sampling):
        sys.stdout.write(event.text)
        sys.stdout.flush()
        times.append(time.perf_counter())
    sys.stdout.write("\n")
    if len(times) > 2:
        each = (times[-1] - times[1]) / (len(times) - 2)
        errors.print(f"{len(times) - 1} tokens, {each * 1e3:.1f} ms a token", style="dim")


def _quiet(verbose: bool) -> None:
    """Keep loading bars and advice of the libraries off the terminal."""
    import warnings

    from transformers.utils import logging as transformers_logging

    if not verbose:
        warnings.filterwarnings("ignore")
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


def main() -> None:
    """Run the command; what the user can mend is one line and exit code 2."""
    verbose = "--verbose" in sys.argv
    try:
        app()
    except ValueError as error:
        if verbose:
            raise
        errors.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            errors.print("stopped; nothing half-written", style="dim")
        raise


if __name__ == "__main__":
    main()
