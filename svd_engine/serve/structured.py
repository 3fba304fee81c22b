"""The form of the text that a body asks for, as options of the engine."""

import re
from typing import Any

from svd_engine.serve.schemas import ResponseFormat, Sampled, StructuredOutputs

ANY_OBJECT = {"type": "object"}


def options(asked: Sampled) -> dict[str, Any]:
    """`regex` or `json_schema`, or neither. Raises ValueError."""
    theirs = _vllm(asked.structured_outputs)
    if asked.response_format is not None and (ours := _openai(asked.response_format)):
        if theirs:
            raise ValueError("response_format and structured_outputs are one field; give one.")
        return ours
    return theirs


def _openai(asked: ResponseFormat) -> dict[str, Any]:
    if (asked.type == "json_schema") != (asked.json_schema is not None):
        raise ValueError("response_format has json_schema exactly if that is its type.")
    if asked.json_schema is not None:
        return {"json_schema": asked.json_schema.schema_}
    return {"json_schema": ANY_OBJECT} if asked.type == "json_object" else {}


def _vllm(asked: StructuredOutputs | None) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    if asked is not None:
        if asked.regex is not None:
            found.append({"regex": asked.regex})
        if asked.json_ is not None:
            found.append({"json_schema": asked.json_})
        if asked.choice is not None:
            found.append({"regex": "|".join(map(re.escape, asked.choice))})
        if asked.json_object:
            found.append({"json_schema": ANY_OBJECT})
        if len(found) != 1:
            raise ValueError("structured_outputs needs one of regex, json, choice, json_object.")
    return found[0] if found else {}
