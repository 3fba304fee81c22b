"""`svd-engine evaluate`: one command per benchmark."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svd_engine.cli import options, split, terminal
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
)
from svd_engine.cli.terminal import say

if TYPE_CHECKING:
    from svd_engine.engine import SteeredEngine
    from svd_engine.evaluate.truthfulqa import Question

app = typer.Typer(no_args_is_help=True, help="Benchmarks: base, adapted and steered side by side.")

app.add_typer(split.app, name="split")
OPEN = "truthfulqa-open.jsonl"


@app.command("truthfulqa")
def truthfulqa_choice(
    adapter: Adapter, data: Data = None, hub: Hub = False, base: Base = None,
    prompt: Prompt = "plain", split_seed: SplitSeed = 0, limit: Limit = None,
    output: Output = RUNS, overwrite: Overwrite = False, allow_overlap: AllowOverlap = False,
    strength: Strength = None, batch_size: BatchSize = 16, dtype: DType = "auto",
    device: Device = "cpu", trust_remote_code: TrustRemoteCode = False,
) -> None:  # fmt: skip
    """TruthfulQA, multiple choice: MC1, MC2 and MC3 on the test fifth."""
    import numpy as np

    from svd_engine.evaluate import run, settings, truthfulqa
    from svd_engine.evaluate.journal import Journal

    template = truthfulqa.template(prompt)
    questions = _test(data, hub, split_seed, limit)
    seen = _overlap(adapter, questions, allow_overlap)
    engine = _engine(base, adapter, dtype, device, strength, trust_remote_code, "ranking")
    wanted = settings.collect(
        engine, "ranking", questions, task="truthfulqa", prompt=prompt, split_seed=split_seed,
        batch_size=batch_size, overlap=seen,
    )  # fmt: skip
    journal = Journal(output / "truthfulqa.jsonl", wanted, overwrite)
    scores = run.by_likelihood(engine, questions, template, journal, batch_size)
    values = {}
    for model, each in scores.items():
        table = np.array([q.metrics(s) for q, s in zip(questions, each, strict=True)])
        values[model] = np.column_stack([table, table.mean(1)])
    _finish(output, "truthfulqa", (*truthfulqa.METRICS, "average"), values, journal.settings)


@app.command("truthfulqa-open")
def truthfulqa_open(
    adapter: Adapter, data: Data = None, hub: Hub = False, base: Base = None,
    prompt: Prompt = "plain", split_seed: SplitSeed = 0, limit: Limit = None,
    max_new_tokens: MaxNewTokens = 50, output: Output = RUNS, overwrite: Overwrite = False,
    allow_overlap: AllowOverlap = False, strength: Strength = None, batch_size: BatchSize = 16,
    dtype: DType = "auto", device: Device = "cpu", trust_remote_code: TrustRemoteCode = False,
) -> None:  # fmt: skip
    """TruthfulQA, open-ended: greedy answers, judged if SVD_JUDGE_URL names a judge."""
    from svd_engine.evaluate import run, settings, truthfulqa
    from svd_engine.evaluate.journal import Journal
    from svd_engine.evaluate.judge import URL, Judge

    template, judged = truthfulqa.template(prompt), Judge.from_environment() is not None
    questions = _test(data, hub, split_seed, limit)
    seen = _overlap(adapter, questions, allow_overlap)
    engine = _engine(base, adapter, dtype, device, strength, trust_remote_code, "generation")
    wanted = settings.collect(
        engine, "generation", questions, task="truthfulqa-open", prompt=prompt,
        split_seed=split_seed, batch_size=batch_size, max_new_tokens=max_new_tokens, overlap=seen,
    )  # fmt: skip
    journal = Journal(output / OPEN, wanted, overwrite)
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
    output: Output = RUNS, overwrite: Overwrite = False, allow_overlap: AllowOverlap = False,
    strength: Strength = None, batch_size: BatchSize = 16, dtype: DType = "float32",
    device: Device = "cpu", trust_remote_code: TrustRemoteCode = False,
) -> None:  # fmt: skip
    """A commonsense task in the instruction format of LLM-Adapters: accuracy on its test file.

    In bfloat16, answers that differ by one token often tie.
    """
    import numpy as np

    from svd_engine.evaluate import commonsense as tasks
    from svd_engine.evaluate import run, settings
    from svd_engine.evaluate.journal import Journal

    if by not in ("likelihood", "generation"):
        raise ValueError(f"--by must be likelihood or generation; got {by!r}.")
    problems = _first(tasks.read(tasks.find(data, task, "test")), limit)
    seen = _overlap(adapter, problems, allow_overlap)
    use = "ranking" if by == "likelihood" else "generation"
    engine = _engine(base, adapter, dtype, device, strength, trust_remote_code, use)
    name = f"{task}-{by}"
    more = {"max_new_tokens": max_new_tokens} if by == "generation" else {}
    wanted = settings.collect(
        engine, use, problems, task=name, batch_size=batch_size, overlap=seen, **more
    )
    journal = Journal(output / f"{name}.jsonl", wanted, overwrite)
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
    _finish(output, name, columns, values, journal.settings)


def _test(data: Path | None, hub: bool, seed: int, limit: int | None) -> "list[Question]":
    from svd_engine.evaluate import truthfulqa

    return _first(truthfulqa.test(options.questions(data, hub), seed), limit)


def _first(items: list, limit: int | None) -> list:
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be >= 1; got {limit}.")
    return items[:limit]


def _overlap(adapter: Path, items: list, allowed: bool) -> dict[str, int]:
    """Count the questions that the adapter saw, by kind; ValueError unless allowed."""
    from svd_engine.data import contamination

    prompts = [item.question for item in items]
    if not allowed:
        try:
            contamination.check(adapter, prompts)
        except ValueError as error:
            raise ValueError(f"{error} --allow-overlap evaluates all the same.") from error
    return {kind: len(found) for kind, found in contamination.found(adapter, prompts).items()}


def _engine(
    base: str | None,
    adapter: Path,
    dtype: str,
    device: str,
    strength: float | None,
    trust_remote_code: bool,
    use: str,
) -> "SteeredEngine":
    from dataclasses import replace

    from svd_engine import SteeredEngine, SteeringConfig

    engine = SteeredEngine.from_pretrained(
        base, adapter, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
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
