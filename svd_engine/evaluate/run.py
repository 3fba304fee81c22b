"""Run base, adapted and steered over the questions of a task, in reproducible batches."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from tqdm.auto import tqdm

from svd_engine.data.tokenization import located
from svd_engine.engine import SteeredEngine
from svd_engine.evaluate.journal import Journal
from svd_engine.generation import scoring
from svd_engine.generation.distribution import steered, unsteered
from svd_engine.generation.passages import collect


class Item(Protocol):
    """The part of a question that an evaluation needs."""

    @property
    def where(self) -> str: ...
    @property
    def question(self) -> str: ...
    @property
    def answers(self) -> list[str]: ...


T = TypeVar("T", bound=Item)


def models(engine: SteeredEngine, use: str) -> tuple[str, ...]:
    """Return the models to compare, "steered" only if the engine has a strength for this use."""
    steered = ("steered",) if use in engine.steering.uses() else ()
    return ("base", "adapted", *steered)


def by_likelihood(
    engine: SteeredEngine, items: Sequence[Item], template: str, journal: Journal, batch_size: int
) -> dict[str, list[list[float]]]:
    """Return model -> log P of every answer of every question.

    The penalty is 0, which keeps answers with tokens off the support comparable.
    """
    passages = []
    for item in items:
        with located(item.where):
            prompt = template.format(question=item.question)
            passages.append(collect(engine.inputs, prompt, item.answers))

    def work(numbers: Sequence[int]) -> list[dict[str, Any]]:
        found = _scores(engine, [passage for i in numbers for passage in passages[i]])
        results, start = [], 0
        for i in numbers:
            end = start + len(passages[i])
            scores = {model: values[start:end] for model, values in found.items()}
            results.append({"question": items[i].question, "scores": scores})
            start = end
        return results

    def are_scores(i: int, value: Any) -> bool:
        return (
            isinstance(value, list)
            and len(value) == len(passages[i])
            and all(type(x) in (int, float) and math.isfinite(x) for x in value)
        )

    kept = _Kept(journal, items, "scores", models(engine, "ranking"), are_scores)
    _in_batches(kept, batch_size, work)
    return kept.by_model()


def by_generation(
    engine: SteeredEngine,
    items: Sequence[T],
    template: str,
    journal: Journal,
    batch_size: int,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    more: Callable[[T], Mapping[str, Any]] = lambda item: {},
) -> dict[str, list[str]]:
    """Return model -> the greedy completion of every question, up to a stop string.

    more: further journal entries of a question.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be >= 1; got {max_new_tokens}.")
    prompts = [template.format(question=item.question) for item in items]
    for item, prompt in zip(items, prompts, strict=True):
        with located(item.where):
            (ids,) = engine.inputs.prompts([prompt])
            engine.inputs.check_room("the question", len(ids), max_new_tokens)

    def work(numbers: Sequence[int]) -> list[dict[str, Any]]:
        texts = {
            model: engine.generate(
                [prompts[i] for i in numbers], model=model, max_new_tokens=max_new_tokens,
                stop_strings=stop, batch_size=len(numbers),
            )
            for model in models(engine, "generation")
        }  # fmt: skip
        return [
            {
                "question": items[i].question,
                **more(items[i]),
                "answers": {model: texts[model][k].text.strip() for model in texts},
            }
            for k, i in enumerate(numbers)
        ]

    kept = _Kept(journal, items, "answers", models(engine, "generation"), _is_text)
    _in_batches(kept, batch_size, work)
    return kept.by_model()


def _is_text(i: int, value: Any) -> bool:
    return isinstance(value, str)


@torch.inference_mode()
def _scores(engine: SteeredEngine, passages: Sequence[scoring.Passage]) -> dict[str, list[float]]:
    """Return model -> log P of each completion, from one pass of the pair."""
    totals = {
        name: torch.zeros(len(passages), dtype=torch.float64) for name in models(engine, "ranking")
    }
    for logits, target, index in scoring.predictions(engine.pair, passages):
        adapted, base = logits[0], logits[-1]
        values = {
            "base": scoring.scores(unsteered(base), target),
            "adapted": scoring.scores(unsteered(adapted), target),
        }
        if (steering := engine.steering.ranking) is not None:
            values["steered"] = scoring.scores(steered(logits, steering, penalty=0.0), target)
        for name, total in totals.items():
            total.index_add_(0, index.cpu(), values[name].double().cpu())
    return {name: total.tolist() for name, total in totals.items()}


@dataclass
class _Kept:
    """The results of a journal, checked before they are used."""

    journal: Journal
    items: Sequence[Item]
    key: str  # "scores" or "answers", which map a model to its value
    models: Sequence[str]
    is_good: Callable[[int, Any], bool]  # of a question's number and the value of one model

    def check(self) -> None:
        """Raise ValueError, with file and line, for a result that is not one of its question."""
        for i, result in self.journal.results.items():
            values = result.get(self.key)
            if (
                result.get("question") != self.items[i].question
                or not isinstance(values, dict)
                or not all(self.is_good(i, values.get(model)) for model in self.models)
            ):
                raise ValueError(
                    f"{self.journal.where(i)}: not the {self.key} of {self.items[i].where}. "
                    "Take the line out, or give --overwrite to start anew."
                )

    def by_model(self) -> dict[str, list]:
        self.check()
        results = [self.journal.results[i][self.key] for i in range(len(self.items))]
        return {model: [values[model] for values in results] for model in self.models}


def _in_batches(
    kept: _Kept, size: int, work: Callable[[Sequence[int]], list[dict[str, Any]]]
) -> None:
    """Run the questions that the journal lacks.

    An incomplete batch runs as a whole, since the sum of floats may depend on the rest of the
    batch, and only the missing results are written.
    """
    if size < 1:
        raise ValueError(f"batch_size must be >= 1; got {size}.")
    kept.check()
    journal, count = kept.journal, len(kept.items)
    with tqdm(total=count, desc="evaluating", unit="question", disable=False) as bar:
        for start in range(0, count, size):
            batch = range(start, min(start + size, count))
            missing = [i for i in batch if i not in journal.results]
            if missing:
                results = work(batch)
                journal.add({i: results[i - start] for i in missing})
            bar.update(len(batch))
