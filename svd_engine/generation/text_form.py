"""Forms that a text must have, a regular expression or a JSON schema, as llguidance takes them."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

# Between the parts of a JSON text. Without an end, some models write spaces until they are stopped.
SPACE = r"[ \n\r\t]{1,32}"


class TextForm(NamedTuple):
    """name: of the option that gave it."""

    name: str
    grammar: str


def read(regex: Any, json_schema: Any) -> TextForm | None:
    """The form that one of two options gives, if any.

    Raise ValueError for a bad one, and where the library is missing.
    """
    if regex is None and json_schema is None:
        return None
    if regex is not None and json_schema is not None:
        raise ValueError("regex and json_schema are two forms of one text; give one of them.")
    name = "json_schema" if regex is None else "regex"
    given = _schema(json_schema) if regex is None else _pattern(regex)
    if find_spec("llguidance") is None:
        raise ValueError(f"{name} needs llguidance; pip install 'svd-engine[grammar]' installs it.")
    from llguidance import LLMatcher

    if regex is None:
        grammar = LLMatcher.grammar_from_json_schema(given, overrides={"whitespace_pattern": SPACE})
    else:
        grammar = LLMatcher.grammar_from_regex(given)
    if error := LLMatcher.validate_grammar(grammar):
        raise ValueError(f"{name} cannot be used: {reason(error)}.")
    return TextForm(name, grammar)


def reason(error: str) -> str:
    """The line of the library's message that says what is wrong."""
    lines = error.splitlines()
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (said or lines)[0].strip().rstrip(".")


def _pattern(regex: Any) -> str:
    if not isinstance(regex, str):
        raise ValueError(f"regex must be a text; got {regex!r}.")
    return regex


def _schema(schema: Any) -> str:
    """The schema as JSON."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
        is_schema = isinstance(json.loads(text), Mapping)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"json_schema must be JSON: {error}.") from error
    if not is_schema:
        raise ValueError(f"json_schema must be an object; got {text[:60]}.")
    return text
