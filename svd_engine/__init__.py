"""Decode with a steering vector at the price of plain decoding.

`svd_engine.ops` holds the operators; `SteeredEngine` generates with them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svd_engine.engine import Completion as Completion
    from svd_engine.engine import Event as Event
    from svd_engine.engine import Score as Score
    from svd_engine.engine import SteeredEngine as SteeredEngine
    from svd_engine.integrations.hugging_face import (
        SteeringLogitsProcessor as SteeringLogitsProcessor,
    )
    from svd_engine.integrations.hugging_face import steered_generate as steered_generate
    from svd_engine.steering_config import Steering as Steering
    from svd_engine.steering_config import SteeringConfig as SteeringConfig

__version__ = "0.2.0"

_EXPORTS = {
    "Completion": "svd_engine.engine",
    "Event": "svd_engine.engine",
    "Score": "svd_engine.engine",
    "SteeredEngine": "svd_engine.engine",
    "Steering": "svd_engine.steering_config",
    "SteeringConfig": "svd_engine.steering_config",
    "SteeringLogitsProcessor": "svd_engine.integrations.hugging_face",
    "steered_generate": "svd_engine.integrations.hugging_face",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import; the operators alone do not need it.
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
