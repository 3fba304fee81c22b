"""`svd-engine generate`."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.rule import Rule

from svd_engine.cli import batch, engines, terminal
from svd_engine.cli.options import (
    Adapter,
    Base,
    Device,
    DType,
    Strength,
    TrustRemoteCode,
    Weights,
)
from svd_engine.cli.settings import parse
from svd_engine.utils.files import read_object

if TYPE_CHECKING:
    from svd_engine import SteeredEngine


def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; standard input if there are none.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A file of prompts, one per line.")] = None,
    whole: Annotated[
        bool,
        typer.Option("--whole", help="Take --file or standard input as one prompt, as it is."),
    ] = False,
    requests: Annotated[
        Path | None,
        typer.Option("--input", help="JSON lines: prompt or messages, and options of their own."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Where --input is answered; the same command goes on where it ended."),
    ] = None,
    adapter: Adapter = ...,  # type: ignore[assignment]
    base: Base = None,
    compare: Annotated[bool, typer.Option(help="Show base, adapted and steered.")] = False,
    chat: Annotated[bool, typer.Option(help="Apply the chat template to each prompt.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum tokens per completion.")] = 128,
    strength: Strength = None,
    alpha: Annotated[float | None, typer.Option(help="Replaces the calibrated alpha.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the tokens that hold this share; 1 is off.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Drop tokens below this share of the most probable; 0 is off.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed for every prompt.")] = 0,
    beams: Annotated[int, typer.Option(help="More than 1 is beam search.")] = 1,
    length_penalty: Annotated[
        float, typer.Option(help="Of beam search: > 0 favours long sequences.")
    ] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Penalise repeated tokens (> 1).")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop before this text; repeatable.")
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="A regular expression that the completion has to match.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="A file with the JSON schema of the completion.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other option of SteeredEngine.generate, as JSON: no_repeat_ngram_size=3, "
            "min_new_tokens=20, max_time=60; repeatable.",
        ),
    ] = None,
    speculate: Annotated[
        list[str] | None,
        typer.Option(
            help="Verify guesses, several tokens per step: prompt (what followed the latest words "
            "before), adapted, an assistant model, the most guesses per step; repeatable."
        ),
    ] = None,
    n: Annotated[int, typer.Option("-n", "--n", help="Completions per prompt.")] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="Decode one batch and write JSON lines.")
    ] = False,
    dtype: DType = "auto",
    weights: Weights = None,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Complete prompts, steered, streamed to the terminal or as JSON lines."""
    more = parse(settings or ())
    form: dict[str, Any] = {} if regex is None else {"regex": regex}
    if json_schema is not None:
        form["json_schema"] = read_object(json_schema, "a JSON schema")
    if (requests is None) != (output is None):
        raise ValueError("--input and --output belong together; give both.")
    if requests is not None and (prompts or file or whole or compare or chat or as_json):
        raise ValueError(
            "--input takes requests alone: no prompts, --file, --whole, --compare, --chat, --json."
        )
    lines = [] if requests is None else batch.read(requests)
    texts = _prompts(prompts, file, whole) if requests is None else []
    from svd_engine.generation.sampling_params import SamplingParams

    options: dict[str, Any] = dict(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, num_beams=beams, length_penalty=length_penalty,
        repetition_penalty=repetition_penalty, num_return_sequences=n,
        stop_strings=[_newlines(text) for text in stop or ()],
    ) | form | more  # fmt: skip
    if "max_length" in more:
        del options["max_new_tokens"]
    if requests is None:
        SamplingParams.from_arguments(**options, seed=seed).seeds(len(texts))
    else:
        batch.check(lines, dict(options, seed=seed))
    sources = [_source(text) for text in speculate or ()]
    steering = engines.steering_beside(adapter, strength, alpha)
    engine = engines.load(adapter, base, dtype, device, trust_remote_code, weights, steering)
    guesses = [_guesser(engine, source, dtype, trust_remote_code) for source in sources]
    options["speculate"] = guesses or None
    for request in lines:
        request.options["speculate"] = options["speculate"]
    if output is not None:
        made = [x for x in (dtype, weights) if x not in ("auto", None)]
        batch.run(engine, lines, output, made)
        return
    chats = [[{"role": "user", "content": text}] for text in texts]
    names = ("base", "adapted", "steered") if compare else ("steered",)
    if as_json:
        all_of_them: dict[str, Any] = {"messages": chats} if chat else {"prompts": texts}
        for model in names:
            completions = engine.generate(
                **all_of_them, model=model, seed=[seed] * len(texts), progress=sys.stderr.isatty(),
                **options,
            )  # fmt: skip
            for i, completion in enumerate(completions):
                line = dict(prompt=texts[i // n], model=model) | asdict(completion)
                terminal.write(json.dumps(line) + "\n")
        return
    write = _write if beams > 1 or n > 1 else _stream
    for text, messages in zip(texts, chats, strict=True):
        asked: dict[str, Any] = {"messages": messages} if chat else {"prompts": text}
        if len(texts) > 1 or compare:
            title = text.strip().replace("\n", " ")[:70]
            terminal.show(Rule(title, align="left", style="dim"))
        for model in names:
            if compare:
                terminal.show(f"{model:8}", style="bold", end="")
            write(engine, dict(asked, model=model, seed=seed, **options))


def _prompts(prompts: list[str] | None, file: Path | None, whole: bool) -> list[str]:
    from svd_engine.data import text_files
    from svd_engine.data.tokenization import check_unicode

    if prompts and file:
        raise ValueError("give prompts as arguments or with --file, not both.")
    if prompts and whole:
        raise ValueError("--whole is about --file and standard input; got a prompt as argument.")
    if prompts:
        prompts = [_newlines(prompt) for prompt in prompts]
    elif file is not None:
        if not file.is_file():
            raise ValueError(f"--file {file} is not a file.")
        prompts = text_files.read_lines(file)
    else:
        if sys.stdin is None:  # closed
            raise ValueError("no prompts came; give them as arguments or with --file.")
        if sys.stdin.isatty():
            what = "The prompt" if whole else "Prompts, one per line,"
            hint = f"{what} from standard input; end with Ctrl-D."
            terminal.errors.print(hint, style="dim")
        prompts = text_files.lines(sys.stdin.buffer.read(), "standard input")
    if whole:
        prompts = ["\n".join(prompts or ()).removesuffix("\n")]
    texts = [prompt for prompt in prompts if prompt.strip()]
    if not texts:
        raise ValueError("no prompts came; give them as arguments, with --file or on stdin.")
    for text in texts:
        check_unicode(text)
    return texts


def _source(text: str) -> int | str:
    """Read a value of --speculate: a word, a number of guesses, or the name of an assistant."""
    from svd_engine import loading
    from svd_engine.data.tokenization import located
    from svd_engine.generation.speculation import ADAPTED, PROMPT
    from svd_engine.utils.arguments import count

    if text in (PROMPT, ADAPTED):
        return text
    with located(f"--speculate {text}"):
        try:
            number = int(text) if text.isdecimal() else float(text)
        except ValueError:
            loading.check_base(text)
            return text
        return count("the number of guesses", number, 1)


def _guesser(
    engine: "SteeredEngine", source: int | str, dtype: str, trust_remote_code: bool
) -> Any:
    """A source of guesses; an assistant is loaded."""
    from svd_engine import loading
    from svd_engine.data.tokenization import located
    from svd_engine.generation.speculation import ADAPTED, PROMPT

    if source in (PROMPT, ADAPTED) or isinstance(source, int):
        return source
    with located(f"--speculate {source}"):
        model, tokenizer = loading.load_base(
            source, dtype=dtype, device=engine.model.device, trust_remote_code=trust_remote_code
        )
        if engine.tokenizer is not None and tokenizer is not None:
            if tokenizer.get_vocab() != engine.tokenizer.get_vocab():
                raise ValueError("the assistant's vocabulary is another one than the engine's.")
    return model


def _newlines(text: str) -> str:
    """Turn \\n into newlines: a shell passes it as two characters."""
    return text.replace("\\n", "\n")


def _write(engine: "SteeredEngine", options: dict[str, Any]) -> None:
    for completion in engine.generate(**options):
        terminal.write(completion.text + "\n")


def _stream(engine: "SteeredEngine", options: dict[str, Any]) -> None:
    times = [time.perf_counter()]
    for event in engine.stream(**options):
        terminal.write(event.text)
        times.append(time.perf_counter())
    terminal.write("\n")
    if len(times) > 2:
        each = (times[-1] - times[1]) / (len(times) - 2)
        terminal.errors.print(
            f"{len(times) - 1} tokens, {each * 1e3:.1f} ms per token", style="dim"
        )
