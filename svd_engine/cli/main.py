"""The `svd-engine` command: its subcommands, and how errors leave it."""

import logging
import os
import sys
from functools import partialmethod
from pathlib import Path
from typing import Annotated

import typer

from svd_engine import __version__
from svd_engine.cli import INTERRUPTED, STOPPED, engines, terminal
from svd_engine.cli.calibrate import calibrate
from svd_engine.cli.chat import chat
from svd_engine.cli.evaluate import app as evaluate
from svd_engine.cli.explain import explain
from svd_engine.cli.export import export
from svd_engine.cli.generate import generate
from svd_engine.cli.harness import SETTINGS as HARNESS
from svd_engine.cli.harness import lm_eval
from svd_engine.cli.options import Base, Device, DType, TrustRemoteCode, Weights
from svd_engine.cli.serve import serve
from svd_engine.cli.train import warm_start

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("warm-start")(warm_start)
app.command("calibrate")(calibrate)
app.command("generate")(generate)
app.command("chat")(chat)
app.command("serve")(serve)
app.add_typer(evaluate, name="evaluate")
app.command("explain")(explain)
app.command("export")(export)
app.command("lm-eval", add_help_option=False, context_settings=HARNESS)(lm_eval)


def _version(show: bool) -> None:
    if show:
        terminal.say(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
    verbose: Annotated[bool, typer.Option(help="Verbose output and tracebacks.")] = False,
) -> None:
    """Decode with a steering vector at the price of plain decoding."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")
    _quiet(verbose)


@app.command()
def env(
    adapter: Annotated[
        Path | None, typer.Option(help="A PEFT adapter: also print how its decode steps run.")
    ] = None,
    base: Base = None,
    dtype: DType = "auto",
    weights: Weights = None,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Print versions, devices and backends, with the reason if one is not available.

    The other options are about the adapter.
    """
    from svd_engine.cli import tables

    step = None
    if adapter is not None:
        step = engines.load(adapter, base, dtype, device, trust_remote_code, weights).step
    elif base is not None or weights is not None:
        raise ValueError("--base and --weights are about an adapter; give --adapter as well.")
    terminal.show(tables.environment(step))


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Folder that keeps the run.")] = Path("runs/demo"),
    fresh: Annotated[
        bool, typer.Option(help="Train again instead of reusing the adapter.")
    ] = False,
) -> None:
    """Run the whole path on SmolLM2-135M: warm start, calibrate, rank, generate, compare."""
    from svd_engine.cli.demo import run

    run(folder, fresh=fresh)


def _quiet(verbose: bool) -> None:
    """Keep the libraries' progress bars and warnings off the terminal."""
    import warnings

    from tqdm.std import tqdm
    from transformers.utils import logging as transformers_logging

    if not verbose:
        warnings.filterwarnings("ignore")
        for library in ("torchao", "torch.utils._pytree"):
            logging.getLogger(library).setLevel(logging.ERROR)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        if "disable" not in getattr(vars(tqdm)["__init__"], "keywords", {}):
            # Of libraries that leave it to tqdm; our own bars ask to be shown.
            tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)  # type: ignore


def main() -> None:
    """Run the command.

    What the user can fix, a ValueError or an OSError, prints one line and exits with 2.
    """
    verbose = "--verbose" in sys.argv
    if verbose:  # it may stand anywhere
        rest = [argument for argument in sys.argv[1:] if argument != "--verbose"]
        sys.argv = [sys.argv[0], "--verbose", *rest]
    sys.stdout = sys.stdout or open(os.devnull, "w")  # Python has none if it is closed
    try:
        try:
            app()
        finally:
            terminal.write("")
    except (OSError, ValueError) as error:
        if verbose:
            raise
        terminal.fail(error)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            terminal.errors.print(STOPPED, style="dim")
        raise


if __name__ == "__main__":
    main()
