"""The `svd-engine` command."""

import json
import logging
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from svd_engine import __version__
from svd_engine.cli.evaluate import app as evaluate

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(evaluate, name="evaluate")
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
    rank: Annotated[int, typer.Option(help="Of LoRA.")] = 8,
    lora_alpha: Annotated[float, typer.Option(help="LoRA's scale is this / rank.")] = 16,
    dropout: Annotated[float, typer.Option(help="Of LoRA.")] = 0.1,
    virtual_tokens: Annotated[int, typer.Option(help="Of prompt, p-tuning and prefix.")] = 20,
    steps: Annotated[int | None, typer.Option(help="Training steps; wins over --epochs.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the training file.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Answers in a batch.")] = 16,
    accumulation: Annotated[int, typer.Option(help="Batches a step.")] = 1,
    learning_rate: Annotated[
        str,
        typer.Option(
            help="The paper's 5e-5 suits LoRA over thousands of answers. auto suits a short run: "
            "lora 5e-4, ia3 5e-3, prompt, p-tuning and prefix 1e-2."
        ),
    ] = "5e-5",
    max_length: Annotated[int, typer.Option(help="Tokens of prompt and answer at most.")] = 512,
    seed: int = 0,
    checkpoint_every: Annotated[
        int, typer.Option(help="Steps; the same command after an interruption goes on from there.")
    ] = 20,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the base; the adapter is float32.")] = "bfloat16",
    device: Device = "cpu",
) -> None:
    """Train an adapter a little: the warm start that steering continues.

    The defaults are the paper's. The losses lie beside the adapter in warm_start.json.
    """
    from svd_engine import loading
    from svd_engine.data import examples
    from svd_engine.training.warm_start import warm_start as train_adapter

    rows = examples.read(train)
    model, tokenizer = loading.load_base(base, dtype=dtype, device=device)
    folder = train_adapter(
        model, tokenizer, rows, output, method=method, rank=rank, lora_alpha=lora_alpha,
        dropout=dropout, virtual_tokens=virtual_tokens, steps=steps, epochs=epochs,
        batch_size=batch_size, accumulation=accumulation, learning_rate=_rate(learning_rate),
        max_length=max_length, seed=seed, checkpoint_every=checkpoint_every, overwrite=overwrite,
    )  # fmt: skip
    console.print(f"Adapter written to {folder}")


@app.command()
def calibrate(
    adapter: Annotated[Path, typer.Argument(help="Folder of the PEFT adapter.")],
    data: Annotated[Path, typer.Argument(help="JSON lines: prompt, completion, rejected.")],
    base: Base = "smollm2",
    objective: Annotated[
        str | None,
        typer.Option(
            help="preference, ranking or nll; by default preference where lines have rejected."
        ),
    ] = None,
    estimator: Annotated[
        str, typer.Option(help="exact, or the paper's mean, median, trimmed or ratio.")
    ] = "exact",
    hessian: Annotated[
        str, typer.Option(help="gauss-newton or newton: the denominators of mean to ratio.")
    ] = "gauss-newton",
    alpha: Annotated[
        list[float] | None,
        typer.Option(
            help="Confidence a token needs to be steered, 0.1 by default; given several times, "
            "cross-validation chooses."
        ),
    ] = None,
    length_normalised: Annotated[
        bool, typer.Option(help="Compare answers by their log-probability a token.")
    ] = False,
    projection: Annotated[
        bool, typer.Option(help="Steer by the projection of the gradient, or by itself.")
    ] = True,
    folds: Annotated[int, typer.Option(help="Parts of the cross-validation.")] = 5,
    seed: int = 0,
    force: Annotated[bool, typer.Option(help="Keep the strength though it gains nothing.")] = False,
    allow_overlap: Annotated[
        bool, typer.Option(help="Take prompts that the adapter was trained on.")
    ] = False,
    dtype: DType = "auto",
    device: Device = "cpu",
) -> None:
    """Find the strength, say what it is worth, write steering_config.json beside the adapter.

    The report lies beside it too: calibration.json, and calibration.png with matplotlib.
    """
    from svd_engine import loading
    from svd_engine.cli import tables
    from svd_engine.data import contamination, examples
    from svd_engine.engine import SteeredEngine

    rows = examples.read(data)
    prompts = contamination.prompts(rows)
    if not allow_overlap:
        contamination.check(adapter, prompts, against=("training",))
    model, tokenizer = loading.load_base(base, dtype=dtype, device=device)
    engine = SteeredEngine(loading.load_adapter(model, adapter), tokenizer)
    report = engine.calibrate(
        rows, objective=objective, estimator=estimator, hessian=hessian, alpha=alpha or 0.1,
        length_normalised=length_normalised, projection=projection, folds=folds, seed=seed,
        force=force, progress=True,
    )  # fmt: skip
    assert engine.steering is not None
    report.save(adapter)
    contamination.record(adapter, "calibration", prompts)
    path = engine.steering.save_pretrained(adapter)
    console.print(tables.calibration(report))
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
    seed: Annotated[int, typer.Option(help="The same for every prompt.")] = 0,
    beams: Annotated[int, typer.Option(help="More than 1 is beam search.")] = 1,
    length_penalty: Annotated[float, typer.Option(help="Of beams: above 0 favours long.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages.")] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; repeatable.")
    ] = None,
    n: Annotated[int, typer.Option("-n", "--n", help="Completions of each prompt.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines, as one batch.")] = False,
    dtype: DType = "auto",
    device: Device = "cpu",
) -> None:
    """Complete prompts, steered, streamed to the terminal or as JSON lines."""
    texts = _prompts(prompts, file)
    from svd_engine.engine import SteeredEngine

    engine = SteeredEngine.from_pretrained(base, adapter, dtype=dtype, device=device)
    engine.steering = _steering(engine.steering, strength, alpha)
    options: dict[str, Any] = dict(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, num_beams=beams, length_penalty=length_penalty,
        repetition_penalty=repetition_penalty, num_return_sequences=n,
        stop_strings=[_newlines(text) for text in stop or ()],
    )  # fmt: skip
    chats = [[{"role": "user", "content": text}] for text in texts]
    names = ("base", "adapted", "steered") if compare else ("steered",)
    if as_json:
        batch: dict[str, Any] = {"messages": chats} if chat else {"prompts": texts}
        for model in names:
            completions = engine.generate(
                **batch, model=model, seed=[seed] * len(texts), progress=sys.stderr.isatty(),
                **options,
            )  # fmt: skip
            for i, completion in enumerate(completions):
                line = dict(prompt=texts[i // n], model=model, **asdict(completion))
                sys.stdout.write(json.dumps(line) + "\n")
        return
    write = _write if beams > 1 or n > 1 else _stream
    for text, messages in zip(texts, chats, strict=True):
        asked: dict[str, Any] = {"messages": messages} if chat else {"prompts": text}
        if len(texts) > 1 or compare:
            console.rule(text.strip().replace("\n", " ")[:70], align="left", style="dim")
        for model in names:
            if compare:
                console.print(f"{model:8}", style="bold", end="")
            write(engine, dict(asked, model=model, seed=seed, **options))


@app.command()
def env() -> None:
    """Versions, devices and backends, with the reason where one is not available."""
    from svd_engine.cli import tables

    console.print(tables.environment())


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the run is kept.")] = Path("runs/demo"),
    fresh: Annotated[bool, typer.Option(help="Train again instead of using the adapter.")] = False,
) -> None:
    """The whole path on SmolLM2-135M: warm start, calibrate, rank, generate, compare."""
    from svd_engine.cli.demo import run

    run(folder, console, fresh=fresh)


def _rate(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


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
    texts = [_newlines(prompt) for prompt in prompts if prompt.strip()]
    if not texts:
        raise ValueError("no prompts came; give them as arguments, with --file or on stdin.")
    return texts


def _steering(config, strength, alpha):
    from dataclasses import replace

    from svd_engine.steering_config import SteeringConfig

    if config is None and strength is None:
        raise ValueError(
            "the adapter has no steering_config.json; run svd-engine calibrate or give --strength."
        )
    config = config or SteeringConfig(0.0)
    changes = {k: v for k, v in (("strength", strength), ("alpha", alpha)) if v is not None}
    return replace(config, **changes)


def _newlines(text: str) -> str:
    """A shell passes \\n as two characters."""
    return text.replace("\\n", "\n")


def _write(engine, options: dict) -> None:
    for completion in engine.generate(**options):
        sys.stdout.write(completion.text + "\n")


def _stream(engine, options: dict) -> None:
    times = [time.perf_counter()]
    for event in engine.stream(**options):
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
        for library in ("torchao", "torch.utils._pytree"):
            logging.getLogger(library).setLevel(logging.ERROR)
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
