"""`svd-engine evaluate`: one command per benchmark."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svd_engine.cli import engines, options, split, terminal
from svd_engine.cli.options import (
    RUNS,
    Adapter,
    AllowOverlap,
    Base,
    BatchSize,
    By,
    Data,
    Device,
    DType,
    Hub,
    Limit,
    MaxNewTokens,
    Output,
    Overwrite,
    Problems,
    Prompt,
    SplitSeed,
    Strength,
    Task,
    TrustRemoteCode,
    Weights,
)
from svd_engine.cli.terminal import say

if TYPE_CHECKING:
    from svd_engine.engine import SteeredEngine
    from svd_engine.evaluate.journal import Journal
    from svd_engine.evaluate.truthfulqa import Question

app = typer.Typer(no_args_is_help=True, help="Benchmarks: base, adapted and steered side by side.")

app.add_typer(split.app, name="split")
OPEN = "truthfulqa-open.jsonl"


@app.command("truthfulqa")
def truthfulqa_choice(
    adapter: Adapter, data: Data = None, hub: Hub = False, base: Base = None,
    prompt: Prompt = "plain", split_seed: SplitSeed = 0, limit: Limit = None,
    output: Output = None, overwrite: Overwrite = False, allow_overlap: AllowOverlap = False,
    strength: Strength = None, batch_size: BatchSize = 16, dtype: DType = "auto",
    weights: Weights = None, device: Device = "cpu", trust_remote_code: TrustRemoteCode = False,
) -> None:  # fmt: skip
    """TruthfulQA, multiple choice: MC1, MC2 and MC3 on the test fifth."""
    import numpy as np

    from svd_engine.evaluate import run, truthfulqa

    template = truthfulqa.template(prompt)
    _check(batch_size=batch_size)
    questions = _test(data, hub, split_seed, limit)
    _refuse_overlap(adapter, questions, allow_overlap)
    engine = _engine(base, adapter, dtype, weights, device, strength, trust_remote_code, "ranking")
    journal = _journal(
        engine, "ranking", questions, adapter, output, overwrite, "truthfulqa.jsonl",
        task="truthfulqa", prompt=prompt, split_seed=split_seed, batch_size=batch_size,
    )  # fmt: skip
    scores = run.by_likelihood(engine, questions, template, journal, batch_size)
    values = {}
    for model, each in scores.items():
        table = np.array([q.metrics(s) for q, s in zip(questions, each, strict=True)])
        values[model] = np.column_stack([table, table.mean(1)])
    columns = (*truthfulqa.METRICS, "average")
    _finish(journal.path.parent, "truthfulqa", columns, values, journal.settings)


@app.command("truthfulqa-open")
def truthfulqa_open(
    adapter: Adapter, data: Data = None, hub: Hub = False, base: Base = None,
    prompt: Prompt = "plain", split_seed: SplitSeed = 0, limit: Limit = None,
    max_new_tokens: MaxNewTokens = 50, output: Output = None, overwrite: Overwrite = False,
    allow_overlap: AllowOverlap = False, strength: Strength = None, batch_size: BatchSize = 16,
    dtype: DType = "auto", weights: Weights = None, device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:  # fmt: skip
    """TruthfulQA, open-ended: greedy answers, judged if SVD_JUDGE_URL names a judge."""
    from svd_engine.evaluate import run, truthfulqa
    from svd_engine.evaluate.judge import URL, Judge

    template, judged = truthfulqa.template(prompt), Judge.from_environment() is not None
    _check(batch_size=batch_size, max_new_tokens=max_new_tokens)
    questions = _test(data, hub, split_seed, limit)
    _refuse_overlap(adapter, questions, allow_overlap)
    engine = _engine(
        base, adapter, dtype, weights, device, strength, trust_remote_code, "generation"
    )
    journal = _journal(
        engine, "generation", questions, adapter, output, overwrite, OPEN, task="truthfulqa-open",
        prompt=prompt, split_seed=split_seed, batch_size=batch_size, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    run.by_generation(
        engine, questions, template, journal, batch_size, max_new_tokens,
        stop=[truthfulqa.NEXT_QUESTION],
        more=lambda question: {"right": question.right, "wrong": question.wrong},
    )  # fmt: skip
    say(f"Answers written to {journal.path}")
    if judged:
        judge(journal.path)
    else:
        say(f"No judge: set {URL}, then svd-engine evaluate judge {journal.path}")


@app.command()
def judge(
    answers: Annotated[Path, typer.Argument(help="The answers file of truthfulqa-open.")],
) -> None:
    """Ask the judge at SVD_JUDGE_URL whether the answers are truthful and informative."""
    from svd_engine.evaluate import verdicts
    from svd_engine.evaluate.judge import URL, Judge

    endpoint = Judge.from_environment()
    if endpoint is None:
        raise ValueError(f"there is no judge: set {URL} to an OpenAI-compatible endpoint.")
    settings, lines = verdicts.read_answers(answers)
    cache = answers.with_name(f"{answers.stem}.verdicts.jsonl")
    values = verdicts.collect(endpoint, lines, cache)
    settings = {**settings, "judge": endpoint.model, "judge_url": endpoint.url}
    _finish(answers.parent, answers.stem, verdicts.METRICS, values, settings)


@app.command()
def commonsense(
    adapter: Adapter, data: Problems, task: Task,
    by: By = "likelihood",
    base: Base = None, limit: Limit = None, max_new_tokens: MaxNewTokens = 32,
    output: Output = None, overwrite: Overwrite = False, allow_overlap: AllowOverlap = False,
    strength: Strength = None, batch_size: BatchSize = 16, dtype: DType = "float32",
    weights: Weights = None, device: Device = "cpu", trust_remote_code: TrustRemoteCode = False,
) -> None:  # fmt: skip
    """A commonsense task in the instruction format of LLM-Adapters: accuracy on its test file.

    In bfloat16, answers that differ by one token often tie.
    """
    import numpy as np

    from svd_engine.evaluate import commonsense as tasks
    from svd_engine.evaluate import run

    if by not in ("likelihood", "generation"):
        raise ValueError(f"--by must be likelihood or generation; got {by!r}.")
    _check(batch_size=batch_size, max_new_tokens=max_new_tokens)
    problems = _first(tasks.read(tasks.find(data, task, "test")), limit)
    _refuse_overlap(adapter, problems, allow_overlap)
    use = "ranking" if by == "likelihood" else "generation"
    engine = _engine(base, adapter, dtype, weights, device, strength, trust_remote_code, use)
    name = f"{task}-{by}"
    more = {"max_new_tokens": max_new_tokens} if by == "generation" else {}
    journal = _journal(
        engine, use, problems, adapter, output, overwrite, f"{name}.jsonl",
        task=name, batch_size=batch_size, **more,
    )  # fmt: skip
    columns: tuple[str, ...] = tasks.METRICS
    if by == "likelihood":
        scores = run.by_likelihood(engine, problems, tasks.TEMPLATE, journal, batch_size)
        values = {
            model: np.array([p.metrics(s) for p, s in zip(problems, each, strict=True)])
            for model, each in scores.items()
        }
    else:
        columns = tasks.GENERATION_METRICS
        texts = run.by_generation(
            engine, problems, tasks.TEMPLATE, journal, batch_size, max_new_tokens
        )
        values = {
            model: np.array([p.judged(t) for p, t in zip(problems, each, strict=True)])
            for model, each in texts.items()
        }
    _finish(journal.path.parent, name, columns, values, journal.settings)


def _test(data: Path | None, hub: bool, seed: int, limit: int | None) -> "list[Question]":
    from svd_engine.evaluate import truthfulqa

    return _first(truthfulqa.test(options.questions(data, hub), seed), limit)


def _check(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1; got {value}.")


def _first(items: list, limit: int | None) -> list:
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be >= 1; got {limit}.")
    return items[:limit]


def _refuse_overlap(adapter: Path, items: list, allowed: bool) -> None:
    """Raise ValueError if the adapter saw questions, unless allowed."""
    from svd_engine.data import contamination

    if not allowed:
        try:
            contamination.check(adapter, [item.question for item in items])
        except ValueError as error:
            raise ValueError(f"{error} --allow-overlap evaluates all the same.") from error


def _journal(
    engine: "SteeredEngine",
    use: str,
    items: list,
    adapter: Path,
    output: Path | None,
    overwrite: bool,
    file: str,
    **more: Any,
) -> "Journal":
    """The results under these settings, in `output` or in a folder that is named by them."""
    from svd_engine.data import contamination
    from svd_engine.evaluate import settings
    from svd_engine.evaluate.journal import Journal

    def of_first(count: int) -> dict[str, Any]:
        part = items[:count]
        found = contamination.found(adapter, [item.question for item in part])
        overlap = {kind: len(prompts) for kind, prompts in found.items()}
        return settings.collect(engine, use, part, **more, overlap=overlap)

    wanted = of_first(len(items))
    folder = output or RUNS / settings.folder_name(adapter.resolve().name, wanted)
    return Journal(folder / file, wanted, overwrite, of_first)


def _engine(
    base: str | None,
    adapter: Path,
    dtype: str,
    weights: str | None,
    device: str,
    strength: float | None,
    trust_remote_code: bool,
    use: str,
) -> "SteeredEngine":
    from dataclasses import replace

    from svd_engine import SteeringConfig

    if strength is not None:
        SteeringConfig(strength)  # refused now rather than after the model is loaded
    engine = engines.load(adapter, base, dtype, device, trust_remote_code, weights)
    if strength is not None:
        config = engine.steering.uses().get(use, SteeringConfig(0.0))
        engine.steering = replace(config, strength=strength)
    if use not in engine.steering.uses():
        say(
            f"No strength for {use}: base and adapted only. Give --strength, or calibrate with "
            f"--use {use}."
        )
    return engine


def _finish(
    folder: Path, name: str, columns: tuple[str, ...], values: dict, settings: dict[str, Any]
) -> None:
    from svd_engine.cli import tables
    from svd_engine.evaluate import report

    result = report.summary(name, columns, values, settings)
    header, *rows = report.rows(result, "{mean}\n{low}..{high}")  # fits 80 columns
    table = tables.grid(*header)
    for row in rows:
        table.add_row(*row)
    title = f"{name}: {result['questions']} questions"
    terminal.show(tables.section(title, table, report.note(result)), highlight=False)
    say(f"Written to {' and '.join(map(str, report.save(result, folder, name)))}")
