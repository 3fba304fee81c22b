"""From a file of prompts to a page on disk."""

import json
from pathlib import Path
from typing import Any

from svd_engine.calibration.report import FILES
from svd_engine.data.checks import check_text
from svd_engine.data.text_files import read_lines
from svd_engine.data.tokenization import is_chat, located
from svd_engine.engine import SteeredEngine
from svd_engine.explain.collect import check, collect
from svd_engine.explain.page import render
from svd_engine.utils.files import read_object, write_text


def read(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines with `prompt` or `messages`; answers in them are left aside.

    Raises ValueError with the file and the line.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Give a file of JSON lines.")
    questions = []
    for number, text in enumerate(read_lines(path), 1):
        if not text.strip():
            continue
        with located(f"{path}:{number}"):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"not JSON: {error}") from error
            questions.append(_question(line))
    if not questions:
        raise ValueError(f"{path} holds no prompts. Write one JSON object per line.")
    return questions


def _question(line: Any) -> dict[str, Any]:
    """`prompt`, text or token ids, or `messages` up to where the assistant answers."""
    if not isinstance(line, dict) or ("prompt" in line) == ("messages" in line):
        raise ValueError('a line is an object with "prompt" or "messages", one of the two.')
    asked: Any = line.get("prompt", line.get("messages"))
    if not is_chat(asked):
        if "messages" in line:
            raise ValueError("messages must be a list of {'role': ..., 'content': ...}.")
        check_text(asked, "prompt")
        return {"prompts": [asked]}
    ends = len(asked) > 1 and asked[-1].get("role") == "assistant"
    return {"messages": asked[:-1] if ends else asked}


def write(
    engine: SteeredEngine,
    questions: list[dict[str, Any]],
    path: Path,
    max_new_tokens: int,
    *,
    adapter: Path | None = None,
    progress: bool = False,
) -> Path:
    """Explain the questions of `read` in a page. adapter: its folder, for the calibration curve."""
    steering = check(engine.steering.generation)
    if engine.tokenizer is None:
        raise ValueError("a page shows text; give the engine a tokenizer.")
    prompts = []
    for i, question in enumerate(questions, 1):
        with located(f"prompt {i}"):
            prompts += engine.inputs.prompts(question.get("prompts"), question.get("messages"))
    report = None if adapter is None else adapter / f"{FILES['generation']}.json"
    calibration = None
    if report is not None and report.is_file():
        calibration = read_object(report, "a calibration")
    answers = collect(engine, prompts, max_new_tokens, progress)
    texts = [str(engine.tokenizer.decode(ids)) for ids in prompts]
    title = f"What steering does: {engine.model.get_base_model().name_or_path}"
    if adapter is not None:
        title += f" with {adapter}"
    page = render(texts, answers, engine.tokenizer, steering, title, calibration)
    write_text(path, page)
    return path
