"""Options that the commands of `svd-engine evaluate` share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from svd_engine.evaluate.truthfulqa import Question

Adapter = Annotated[Path, typer.Option(help="Folder of the PEFT adapter.")]
Base = Annotated[str, typer.Option(help='Base model: a folder, a Hub name or "smollm2".')]
Data = Annotated[Path | None, typer.Option(help="mc_task.json or TruthfulQA.csv.")]
Hub = Annotated[bool, typer.Option("--hub", help="The questions from the Hugging Face Hub.")]
Prompt = Annotated[
    str, typer.Option(help="plain: the question alone; primer: after the benchmark's six examples.")
]
SplitSeed = Annotated[int, typer.Option(help="Shuffles the questions before they are split.")]
CalibrationSize = Annotated[int, typer.Option(help="Questions for calibration.")]
Limit = Annotated[int | None, typer.Option(help="The first questions only.")]
Output = Annotated[Path, typer.Option(help="Folder of results; a killed run goes on from it.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start anew.")]
Allow = Annotated[
    bool, typer.Option("--allow-overlap", help="Also with questions that the adapter has seen.")
]
Strength = Annotated[float | None, typer.Option(help="In place of the calibrated one.")]
BatchSize = Annotated[int, typer.Option(help="Questions at once.")]
MaxNewTokens = Annotated[int, typer.Option(help="Tokens of an answer at most.")]
Task = Annotated[
    str,
    typer.Option(help="boolq, piqa, siqa, hellaswag, winogrande, arc-easy, arc-challenge or obqa."),
]
By = Annotated[str, typer.Option(help="likelihood of the outputs, or generation.")]
Problems = Annotated[Path, typer.Option(help="A file, or a folder as in LLM-Adapters.")]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
RUNS = Path("runs/evaluate")

console = Console()


def questions(data: Path | None, hub: bool) -> "list[Question]":
    """The questions of TruthfulQA from where the options say."""
    from svd_engine.evaluate import truthfulqa_files

    if hub == (data is not None):
        raise ValueError("give --data with a file, or --hub.")
    return truthfulqa_files.read_hub() if data is None else truthfulqa_files.read(data)


def say(text: str) -> None:
    """One line to the terminal."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)
