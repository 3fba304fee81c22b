"""`svd-engine generate --input FILE --output FILE`: requests in, completions out, resumable.

A request is a JSON line with `prompt` or `messages`; its other fields are options of `generate`,
`strength`, `alpha` and `model` among them, and `id`, which is copied.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svd_engine.cli import settings, terminal
from svd_engine.data import text_files
from svd_engine.data.checks import check_text
from svd_engine.data.tokenization import located
from svd_engine.steering_config import SteeringConfig
from svd_engine.utils.files import check_place, parse_object

if TYPE_CHECKING:
    from svd_engine.engine import SteeredEngine

SIZE = 32  # requests decoded at once
FORMS = {"regex", "json_schema"}  # a request's own replaces that of the command
OWN = {"prompt", "messages", "id", "strength", "alpha", "model", "seed"}


@dataclass
class Request:
    """A line of the input, and what `generate` is called with."""

    where: str
    line: dict[str, Any]
    asked: Any  # the prompt or the messages
    options: dict[str, Any]

    @property
    def kind(self) -> str:
        return "messages" if "messages" in self.line else "prompts"


def read(path: Path) -> list[Request]:
    """Read the requests of a file. Raises ValueError with the file and the line."""
    requests = []
    for number, text in enumerate(text_files.read_lines(path), 1):
        if not text.strip():
            continue
        with located(f"{path}:{number}"):
            line = parse_object(text.encode())
            if ("prompt" in line) == ("messages" in line):
                raise ValueError("a request has prompt or messages, one of the two.")
            more = {k: v for k, v in line.items() if k not in OWN}
            asked = line.get("prompt", line.get("messages"))
            if "prompt" in line:
                check_text(asked, "prompt")
            options = settings.checked(more, "request")
            options |= {k: line[k] for k in ("model", "seed") if k in line}
            requests.append(Request(f"{path}:{number}", line, asked, options))
    if not requests:
        raise ValueError(f"{path} holds no requests. Write one JSON object per line.")
    return requests


def check(requests: list[Request], defaults: Mapping[str, Any]) -> None:
    """Complete the requests' options; ValueError for one that no model could be asked with."""
    from svd_engine.generation.options import SamplingOptions
    from svd_engine.generation.sampling_params import SamplingParams

    for request in requests:
        with located(request.where):
            left_out = FORMS if FORMS & request.options.keys() else ()
            kept = {k: v for k, v in defaults.items() if k not in left_out}
            request.options = {**kept, **request.options}
            if "max_length" in request.options:
                request.options.pop("max_new_tokens", None)
            names = SamplingOptions.__annotations__.keys() & request.options.keys()
            given: dict[str, Any] = {name: request.options[name] for name in names}
            SamplingParams.from_arguments(**given).seeds(1)


def run(
    engine: "SteeredEngine", requests: list[Request], output: Path, made: Sequence[str]
) -> None:
    """Decode the requests of `check` that the output does not hold, and append their completions.

    made: how the engine was made, where that is not the default.
    Raise ValueError before any work for a request that cannot be decoded, and for an output of
    other requests.
    """
    from svd_engine.evaluate.journal import append, whole_lines

    check_place(output)
    for request in requests:
        with located(request.where):
            by = {k: request.line[k] for k in ("strength", "alpha") if k in request.line}
            if by:
                config = engine.steering.generation or SteeringConfig(0.0)
                request.options["steering"] = replace(config, **by)
            _validate(engine, request)
    marks = [_fingerprint(engine, request, made) for request in requests]
    done = whole_lines(output)
    for number, line in enumerate(done):
        if number >= len(requests) or line.get("fingerprint") != marks[number]:
            raise ValueError(
                f"{output}:{number + 1} answers another request, or under other options; give "
                "another --output."
            )
    for group in _groups(requests, len(done)):
        first = requests[group[0]]
        options, copies = dict(first.options), first.options["num_return_sequences"]
        seed = options.pop("seed")
        asked: Any = {first.kind: [requests[i].asked for i in group]}
        found = engine.generate(**asked, **options, seed=[seed] * len(group))
        lines = []
        for place, i in enumerate(group):
            completions = found[place * copies : (place + 1) * copies]
            own = {k: v for k, v in requests[i].line.items() if k in ("id", "prompt", "messages")}
            lines.append(
                {"fingerprint": marks[i], **own, "completions": [asdict(c) for c in completions]}
            )
        append(output, lines)
    terminal.say(f"{len(requests)} requests, {len(requests) - len(done)} of them new: {output}")


def _validate(engine: "SteeredEngine", request: Request) -> None:
    """Raise ValueError unless the request can be decoded."""
    options: Any = {k: v for k, v in request.options.items() if k != "num_beams"}
    if request.options["num_beams"] != 1:
        options.pop("num_return_sequences")
    asked: Any = {request.kind: [request.asked]}
    engine.stream(**asked, **options).close()


def _fingerprint(engine: "SteeredEngine", request: Request, made: Sequence[str]) -> str:
    """What the answer depends on."""
    steering: Any = request.options.get("steering", engine.steering)
    options = {k: v for k, v in request.options.items() if k not in ("steering", "speculate")}
    parts = [request.line, options, asdict(steering), repr(engine).partition(", step=")[0]]
    parts += made
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _groups(requests: list[Request], start: int) -> Iterator[list[int]]:
    """Consecutive requests of the same options."""
    group: list[int] = []
    for i in range(start, len(requests)):
        one, other = requests[i], requests[group[0]] if group else requests[i]
        same = (one.kind, one.options) == (other.kind, other.options)
        if group and (not same or len(group) == SIZE):
            yield group
            group = []
        group.append(i)
    if group:
        yield group
