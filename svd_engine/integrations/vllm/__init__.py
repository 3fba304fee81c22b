"""Steered decoding inside vLLM: its scheduler, paged cache and server, our pair of models.

vLLM's own class of an architecture runs on twice the rows, the base's first and the adapted's
after them, under one cache of twice the heads; `compute_logits` makes one row of the two. Nothing
of vLLM is changed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svd_engine.integrations.vllm.arguments import engine_args as engine_args

__all__ = ["engine_args"]


def __getattr__(name: str) -> Any:
    # vLLM imports `plugin` in every process of every program: nothing heavy comes with it.
    if name == "engine_args":
        return import_module(f"{__name__}.arguments").engine_args
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
