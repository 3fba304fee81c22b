"""From a checked request to completions, and to events as the tokens come."""

import time
from collections.abc import Generator, Iterator
from dataclasses import replace

from tqdm.auto import tqdm

from svd_engine import ops
from svd_engine.generation.beam_search import Beam, search
from svd_engine.generation.decode_loop import decode
from svd_engine.generation.detokenizer import Detokenizer, first_stop
from svd_engine.generation.distribution import Distribution, unsteered
from svd_engine.generation.request import Best, Completion, Event, Request
from svd_engine.model.pair import PerModel


def complete(request: Request, progress: bool) -> list[Completion]:
    """The completions, in order: those of prompt i begin at i * num_return_sequences."""
    start, copies = time.perf_counter(), request.sampling.num_return_sequences
    completions = [
        Completion(prompt_tokens=len(prompt)) for prompt in request.prompts for _ in range(copies)
    ]
    ended = _beams if request.sampling.num_beams > 1 else _drawn
    with tqdm(total=len(completions), disable=not progress, desc="generating") as bar:
        for completion in ended(request, completions, start):
            completion.seconds = time.perf_counter() - start
            bar.update()
    return completions


def events(request: Request, text: bool = True) -> Generator[Event, None, None]:
    """An event a token; rows of prompt i begin at i * num_return_sequences."""
    sampling, copies = request.sampling, request.sampling.num_return_sequences
    seeds = sampling.seeds(len(request.prompts))
    for group in request.groups():
        prompts = [request.prompts[i] for i in group]
        texts = [Detokenizer(request.text, request.stops[i]) for i in group for _ in range(copies)]
        counts = [0] * len(texts)
        stopped: set[int] = set()
        best = _TopLogprobs(sampling.top_logprobs, request.model) if sampling.top_logprobs else None
        steps = decode(
            request.pair, request.steering, prompts,
            replace(sampling, seed=[seeds[i] for i in group]), request.ends, request.process,
            stopped, best,
        )  # fmt: skip
        for row, token, logprob in (drawn for step in steps for drawn in step):
            counts[row] += 1
            reason: int | str | None = token if token in request.ends else None
            full = counts[row] == sampling.limit(len(prompts[row // copies]))
            piece = texts[row].add(token, reason is not None or full) if text else ""
            if texts[row].stop is not None:
                reason = texts[row].stop
                stopped.add(row)
            yield Event(
                group[row // copies] * copies + row % copies, token, logprob, piece,
                "stop" if reason is not None else "length" if full else None, reason,
                best.latest[row] if best else None,
            )  # fmt: skip


def _drawn(request: Request, completions: list[Completion], start: float) -> Iterator[Completion]:
    """Fills the completions token by token; gives out each that has ended."""
    stops = any(request.stops)
    for event in events(request, text=stops):
        completion = completions[event.row]
        if not completion.token_ids:
            completion.seconds_to_first_token = time.perf_counter() - start
        completion.token_ids.append(event.token_id)
        completion.logprobs.append(event.logprob)
        completion.text += event.text
        if event.top_logprobs is not None:
            completion.top_logprobs.append(event.top_logprobs)
        if event.finish_reason is not None:
            completion.finish_reason = event.finish_reason
            completion.stop_reason = event.stop_reason
            if not stops:
                completion.text = request.text(completion.token_ids)
            yield completion


def _beams(request: Request, completions: list[Completion], start: float) -> Iterator[Completion]:
    """Fills the completions with the best beams of each prompt."""
    sampling, copies = request.sampling, request.sampling.num_return_sequences
    # As in transformers: however many end, num_beams are left to go on.
    candidates = max(2, 1 + len(request.ends)) * sampling.num_beams
    for group in request.groups():

        def stop(i: int, token_ids: list[int], group: list[int] = group) -> int | str | None:
            if token_ids[-1] in request.ends:
                return token_ids[-1]
            stops = request.stops[group[i]]
            found = first_stop(request.text(token_ids), stops) if stops else None
            return found and found[1]

        found = search(
            request.pair, request.steering, [request.prompts[i] for i in group], sampling, stop,
            candidates, request.process,
        )  # fmt: skip
        for i, beams in zip(group, found, strict=True):
            for j in range(copies):
                completion = completions[i * copies + j]
                if beams:  # where the support leaves fewer, the last is repeated
                    _fill(completion, beams[min(j, len(beams) - 1)], request, request.stops[i])
                completion.seconds_to_first_token = time.perf_counter() - start
                yield completion


def _fill(completion: Completion, beam: Beam, request: Request, stops: list[str]) -> None:
    completion.token_ids, completion.logprobs = list(beam.token_ids), list(beam.logprobs)
    completion.score, completion.stop_reason = beam.score, beam.stop
    completion.finish_reason = "length" if beam.stop is None else "stop"
    text = request.text(beam.token_ids)
    cut = first_stop(text, stops)
    completion.text = text[: cut[0]] if cut else text


class _TopLogprobs:
    """Keeps the k best tokens of each row of the latest step."""

    def __init__(self, k: int, model: str) -> None:
        self.k, self.model = k, model
        self.latest: dict[int, Best] = {}

    def __call__(self, rows: list[int], logits: PerModel, drawn_from: Distribution) -> None:
        tables = {self.model: ops.topk(*drawn_from.operands, self.k, **drawn_from.mask)}
        if self.model == "steered":
            for name, own in zip(("adapted", "base"), logits, strict=True):
                alone = unsteered(own)
                tables[name] = ops.topk(*alone.operands, self.k, **alone.mask)
        lists = {name: (t.token.tolist(), t.logprob.tolist()) for name, t in tables.items()}
        self.latest = {
            row: {
                name: list(zip(tokens[i], logprobs[i], strict=True))
                for name, (tokens, logprobs) in lists.items()
            }
            for i, row in enumerate(rows)
        }
