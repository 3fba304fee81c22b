"""The engine of a command, and the steering that its options ask for."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svd_engine import SteeredEngine, SteeringConfig


def load(
    adapter: Path,
    base: str | None,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    weights: str | None = None,
    steering: "SteeringConfig | None" = None,
) -> "SteeredEngine":
    """Load the engine of an adapter. steering: in place of the one beside it."""
    from svd_engine.engine import SteeredEngine

    engine = SteeredEngine.from_pretrained(
        base, adapter, dtype=dtype, device=device, trust_remote_code=trust_remote_code,
        weights=weights,
    )  # fmt: skip
    if steering is not None:
        engine.steering = steering
    return engine


def steering_beside(adapter: Path, strength: float | None, alpha: float | None) -> "SteeringConfig":
    """The steering of generation in an adapter's folder, but for what options replace."""
    from svd_engine import hub, loading
    from svd_engine.steering_config import Steering

    folder = hub.adapter_folder(adapter)
    found = Steering.from_pretrained(folder) if loading.has_steering(folder) else Steering()
    return steering_of(found.generation, strength, alpha)


def steering_of(
    config: "SteeringConfig | None", strength: float | None, alpha: float | None
) -> "SteeringConfig":
    """The calibrated steering, but for what options replace; ValueError without a strength."""
    from svd_engine.steering_config import SteeringConfig

    if config is None and strength is None:
        raise ValueError(
            "the adapter has no steering_config.json with a strength for generation; run "
            "svd-engine calibrate or give --strength."
        )
    config = config or SteeringConfig(0.0)
    if strength is not None:
        config = replace(config, strength=strength)
    return config if alpha is None else replace(config, alpha=alpha)
