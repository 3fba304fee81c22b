"""From a validated request to completions, or to events as the tokens come."""

import time
from collections.abc import Generator, Iterator

from tqdm.auto import tqdm

from svd_engine.generation.beam_search import search
from svd_engine.generation.decode_loop import Batch
from svd_engine.generation.outputs import Completion, Event
from svd_engine.generation.request import Request
from svd_engine.generation.sequence import Sequence
from svd_engine.generation.speculative_loop import SpeculativeBatch


def complete(request: Request, progress: bool) -> list[Completion]:
    """Decode every sequence of the request; return their completions in order."""
    start, sequences = time.perf_counter(), request.sequences
    growing = _beam_searched if request.sampling.num_beams > 1 else _decoded
    with tqdm(total=len(sequences), disable=not progress, desc="generating") as bar:
        for sequence in growing(request):
            seconds = time.perf_counter() - start
            if sequence.seconds_to_first_token == 0:
                sequence.seconds_to_first_token = seconds
            if sequence.is_finished:
                sequence.seconds = seconds
                bar.update()
    return [sequence.completion(request.model) for sequence in sequences]


def events(request: Request) -> Generator[Event, None, None]:
    """Decode the request; yield an event per token. An event's row is its sequence's index."""
    for group in request.groups():
        if request.is_over:
            _give_up(group)
            continue
        batch = (Batch if request.speculation is None else SpeculativeBatch)(request, group)
        while not batch.is_finished:
            found = batch.step()
            batch.keep_finished()
            yield from found


def _decoded(request: Request) -> Iterator[Sequence]:
    """Yield a sequence for each of its tokens."""
    return (request.sequences[event.row] for event in events(request))


def _beam_searched(request: Request) -> Iterator[Sequence]:
    """Yield each sequence once, finished."""
    for group in request.groups():
        if request.is_over:
            _give_up(group)
        else:
            search(request, group)
        yield from group


def _give_up(group: list[Sequence]) -> None:
    """Finish sequences for which there is no time."""
    for sequence in group:
        if not sequence.is_finished:
            sequence.finish("time")
