"""Options that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from svd_engine.evaluate.truthfulqa import Question

Adapter = Annotated[Path, typer.Option(help="Folder or Hub name of the PEFT adapter.")]
Base = Annotated[
    str | None,
    typer.Option(
        help='Base model: a folder, a Hub name or "smollm2"; by default the one that the adapter '
        "names."
    ),
]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Weights = Annotated[
    str | None, typer.Option(help="int8 or int4: make codes of the base's weights, on a CPU.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the base.")
]
Strength = Annotated[float | None, typer.Option(help="Replaces the calibrated strength.")]

# of `svd-engine evaluate`
RUNS = Path("runs/evaluate")
Data = Annotated[Path | None, typer.Option(help="mc_task.json or TruthfulQA.csv.")]
Hub = Annotated[bool, typer.Option("--hub", help="Load the questions from the Hugging Face Hub.")]
Prompt = Annotated[
    str, typer.Option(help="plain: only the question; primer: after the benchmark's six examples.")
]
SplitSeed = Annotated[int, typer.Option(help="Seed of the shuffle before the split.")]
CalibrationSize = Annotated[int, typer.Option(help="Number of questions for calibration.")]
Limit = Annotated[int | None, typer.Option(help="Evaluate only the first questions.")]
Output = Annotated[
    Path | None,
    typer.Option(
        help="Folder of results, by default one in runs/evaluate that is named by adapter and "
        "settings. An interrupted run, and one with a larger --limit, goes on there."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Discard earlier results.")]
AllowOverlap = Annotated[
    bool, typer.Option("--allow-overlap", help="Accept questions that the adapter has seen.")
]
BatchSize = Annotated[int, typer.Option(help="Questions per batch.")]
MaxNewTokens = Annotated[int, typer.Option(help="Maximum tokens per answer.")]
Task = Annotated[
    str,
    typer.Option(help="boolq, piqa, siqa, hellaswag, winogrande, arc-easy, arc-challenge or obqa."),
]
By = Annotated[str, typer.Option(help="likelihood of the outputs, or generation.")]
Problems = Annotated[Path, typer.Option(help="A file, or a folder laid out as in LLM-Adapters.")]


def questions(data: Path | None, hub: bool) -> "list[Question]":
    """Read TruthfulQA from the source that --data or --hub names."""
    from svd_engine.evaluate import truthfulqa_files

    if hub == (data is not None):
        raise ValueError("give --data with a file, or --hub.")
    return truthfulqa_files.read_hub() if data is None else truthfulqa_files.read(data)
