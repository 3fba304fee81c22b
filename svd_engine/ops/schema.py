"""Operators as torch registers them: packed arguments as the flat list of a schema, and back.

An operator's arguments are a table of names and types; a NamedTuple there stands for its fields.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

Fields = Mapping[str, Any]  # name -> type
TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    int: "SymInt",
    str: "str",
    torch.dtype | None: "ScalarType?",
}


def declared(fields: Fields) -> str:
    """The arguments of a schema."""
    arguments = []
    for name, kind in fields.items():
        if kind in TYPES:
            arguments.append(f"{TYPES[kind]} {name}")
        elif get_origin(kind) is tuple:  # PerRow
            arguments.append(f"{TYPES[get_args(kind)[0]]} {name}, Tensor? {name}s")
        else:
            arguments.append(declared(get_type_hints(kind)))
    return ", ".join(arguments)


def flat(arguments: Iterable[Any]) -> list[Any]:
    """The arguments in the order of the schema."""
    leaves: list[Any] = []
    for argument in arguments:
        leaves += flat(argument) if isinstance(argument, tuple) else [argument]
    return leaves


def packed(fields: Fields, leaves: Iterator[Any]) -> tuple[Any, ...]:
    """The arguments as the table has them, taken from those of the schema."""
    return tuple(_take(kind, leaves) for kind in fields.values())


def _take(kind: Any, leaves: Iterator[Any]) -> Any:
    if kind in TYPES:
        return next(leaves)
    if get_origin(kind) is tuple:
        return next(leaves), next(leaves)
    return kind(*packed(get_type_hints(kind), leaves))
