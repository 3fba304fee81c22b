"""The demo: the whole path on a real model, with its results."""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Group
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from svd_engine import calibration, loading
from svd_engine.calibration import support_stats
from svd_engine.calibration.objectives import Answers
from svd_engine.calibration.report import CalibrationReport
from svd_engine.cli import almanac, tables, terminal
from svd_engine.data.examples import encode
from svd_engine.engine import SteeredEngine
from svd_engine.evaluate import metrics
from svd_engine.explain import write as explain
from svd_engine.training.warm_start import warm_start
from svd_engine.utils import bootstrap
from svd_engine.utils.files import write_text

TRAINING: dict[str, Any] = dict(method="lora", steps=20, batch_size=8, learning_rate=4e-4, seed=0)
SPLIT = 1  # the training settings were chosen on split 0
SHOWN = 4  # number of questions whose answers are printed
TIMED_TOKENS, TIMED_RUNS = 64, 3


def run(folder: Path, fresh: bool = False) -> None:
    """Train, calibrate, rank, answer and time; keep the files in `folder`."""
    task = almanac.build(SPLIT)
    for split, questions in task.items():
        lines = [json.dumps(question) + "\n" for question in questions]
        write_text(folder / f"{split}.jsonl", "".join(lines))
    summary, _, policy = (almanac.__doc__ or "").partition("\n\n")
    policy = " ".join(policy.split("`almanac")[0].split())
    terminal.show(Text.assemble((summary, "bold"), " ", policy))
    sizes = [f"{len(questions)} questions to {split}" for split, questions in task.items()]
    terminal.show(", ".join(sizes))

    terminal.show("\nLoading SmolLM2-135M-Instruct ...")
    base, tokenizer = loading.load_base(loading.SMOLLM2)
    adapter = _adapter(folder, base, tokenizer, task["train"], fresh)
    engine = SteeredEngine(loading.load_adapter(base, adapter), tokenizer)

    for use, objective in (("generation", "nll"), ("ranking", "preference")):
        report = engine.calibrate(task["calibration"], use=use, objective=objective, progress=True)
        calibration.save(adapter, report, engine.steering, task["calibration"])
        terminal.show(tables.calibration(report))

    # Without a gain the saved strength is 0; the comparison still shows the estimate.
    ranked = _rank(engine, task["test"], report)
    terminal.show(_metrics_table(ranked, report.strength))
    terminal.show(_answers(engine, task["test"], folder / "answers.jsonl"))
    page = _page(engine, task["test"], folder / "page.html", adapter)
    times = _times(engine, task["test"][0]["prompt"])
    terminal.show(_times_table(times))
    gains = 100 * (ranked["steered"] - ranked["adapted"]).mean(1)
    gain = float(gains.mean()), *bootstrap.of_ratio(gains)
    terminal.show(_last_word(gain, report.strength, adapter, page))
    results = dict(
        training=TRAINING, split=SPLIT,
        calibration={k: v for k, v in asdict(report).items() if k != "curve"},
        per_cent={
            name: dict(zip(metrics.NAMES, (100 * values.mean(0)).round(2).tolist(), strict=True))
            for name, values in ranked.items()
        },
        gain=dict(zip(("points", "low", "high"), gain, strict=True)),
        ms_a_token=times, torch=torch.__version__, threads=torch.get_num_threads(),
    )  # fmt: skip
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")


def _adapter(
    folder: Path,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[almanac.Question],
    fresh: bool,
) -> Path:
    """Return the adapter trained on these questions; train it unless it exists."""
    adapter, recipe = folder / "adapter", folder / "adapter.json"
    wanted = json.dumps({"training": TRAINING, "rows": questions}, sort_keys=True)
    same = recipe.is_file() and recipe.read_text(encoding="utf-8") == wanted
    if same and adapter.is_dir() and not fresh:
        terminal.show(f"The adapter is there ({adapter}); --fresh trains it again.\n")
        return adapter
    settings = ", ".join(f"{k} {v}" for k, v in TRAINING.items())
    terminal.show(f"Warm start: {settings}")
    warm_start(base, tokenizer, questions, adapter, overwrite=True, **TRAINING)
    write_text(recipe, wanted)
    return adapter


def _rank(
    engine: SteeredEngine, questions: Sequence[almanac.Question], report: CalibrationReport
) -> dict[str, np.ndarray]:
    """MC1, MC2 and MC3 of every test question by model, `[questions, 3]`."""
    answers = Answers(encode(questions, engine.tokenizer))
    stats = support_stats.collect(engine.pair, answers.passages, report.alpha, "ranking")
    scores = {
        "base": stats.totals(stats.base, len(answers.passages)).numpy(),
        "adapted": answers.scores(stats, 0.0),
        "steered": answers.scores(stats, report.strength),
    }
    return {k: metrics.table(v, answers.right, answers.wrong) for k, v in scores.items()}


def _metrics_table(ranked: dict[str, np.ndarray], strength: float) -> Group:
    count = len(ranked["base"])
    title = f"Ranking right above wrong answers: {count} test questions, mu = {strength:+.2f}"
    table = tables.grid("", *metrics.NAMES, "average")
    for name, values in ranked.items():
        columns = 100 * np.column_stack([values, values.mean(1)])
        spans = [bootstrap.of_ratio(column) for column in columns.T]
        table.add_row(
            name,
            *(
                f"{mean:.1f} [{low:.0f}, {high:.0f}]"
                for mean, (low, high) in zip(columns.mean(0), spans, strict=True)
            ),
        )
    return tables.section(title, table, "Per cent, with 95 % bootstrap intervals.")


def _answers(engine: SteeredEngine, questions: Sequence[almanac.Question], path: Path) -> Group:
    """Answer every test question greedily with each model: all to a file, a few to the screen."""
    prompts = [question["prompt"] for question in questions]
    answers = []
    for model in ("base", "adapted", "steered"):
        completions = engine.generate(prompts, model=model, max_new_tokens=24, progress=True)
        answers.append([c.text.strip().split("\n")[0] for c in completions])
    table = tables.grid("question", "model", "answer")
    for column in table.columns:
        column.justify, column.overflow = "left", "fold"
    lines = []
    for question, base, adapted, steered in zip(questions, *answers, strict=True):
        asked = question["prompt"].removeprefix("Q: ").removesuffix("\nA:")
        wanted = question["completion"].strip()
        shown = dict(base=base, adapted=adapted, steered=steered, wanted=wanted)
        lines.append(json.dumps(dict(question=asked, **shown)) + "\n")
        if len(lines) <= SHOWN:
            for model, answer in shown.items():
                table.add_row(
                    asked if model == "base" else "", model, answer,
                    style="dim" if model == "wanted" else None, end_section=model == "wanted",
                )  # fmt: skip
    write_text(path, "".join(lines))
    changed = sum(a != s for a, s in zip(answers[1], answers[2], strict=True))
    note = f"Steering changed {changed} of {len(questions)} answers; all are in {path}."
    return tables.section("Greedy answers to test questions", table, note)


def _page(
    engine: SteeredEngine, questions: Sequence[almanac.Question], path: Path, adapter: Path
) -> Path:
    """Write a page that shows the first questions' answers token by token."""
    asked = [{"prompts": [question["prompt"]]} for question in questions[:SHOWN]]
    return explain.write(engine, asked, path, max_new_tokens=24, adapter=adapter)


def _times(engine: SteeredEngine, prompt: str) -> dict[str, float]:
    """Milliseconds per token at batch 1, same loop and KV cache for both; medians of TIMED_RUNS."""

    def once(model: str) -> float:
        marks = [
            time.perf_counter()
            for _ in engine.stream(
                prompt, model=model, max_new_tokens=TIMED_TOKENS, eos_token_id=[]
            )
        ]
        return (marks[-1] - marks[0]) / (len(marks) - 1) * 1e3

    for model in ("adapted", "steered"):
        once(model)
    runs = [(once("adapted"), once("steered")) for _ in range(TIMED_RUNS)]
    alone, steered = (statistics.median(column) for column in zip(*runs, strict=True))
    return dict(adapted=alone, steered=steered)


def _times_table(times: dict[str, float]) -> Group:
    alone, steered = times["adapted"], times["steered"]
    title = f"Time per token: batch 1, {TIMED_TOKENS} tokens, median of {TIMED_RUNS} runs"
    table = tables.grid("", "ms per token", "tokens/s")
    table.add_row("adapted alone, un-steered", f"{alone:.1f}", f"{1e3 / alone:.1f}")
    table.add_row("steered", f"{steered:.1f}", f"{1e3 / steered:.1f}")
    note = f"A steered token takes {steered / alone:.2f} times the time of an un-steered one."
    return tables.section(title, table, note)


def _last_word(
    gain: tuple[float, float, float], strength: float, adapter: Path, page: Path
) -> Text:
    points, low, high = gain
    verdict = (
        "Steering helped: the interval is above 0."
        if low > 0
        else "Steering hurt: the interval is below 0."
        if high < 0
        else "The interval contains 0: on these questions steering cannot be told from none."
    )
    return Text.assemble(
        (
            f"Steered against adapted: {points:+.1f} points on average, 95 % interval "
            f"[{low:+.1f}, {high:+.1f}]. {verdict}\n",
            "bold",
        ),
        f"The strength {strength:+.2f} was fitted on the calibration questions alone.\n"
        f"Open {page} in a browser to see what steering does, token by token.\n"
        f"Try it: svd-engine generate --adapter {adapter} --compare 'Q: Will it rain today?\\nA:'",
    )
