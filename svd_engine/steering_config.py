"""SteeringConfig: how to steer; Steering: one for each use, kept as `steering_config.json`.

The file lies beside `adapter_config.json`.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from svd_engine.ops import checks
from svd_engine.utils.files import read_object, write_text

FILE_NAME = "steering_config.json"
USES = ("generation", "ranking")  # what texts are decoded with, and what answers are scored with
TEXTS = (
    "objective", "estimator", "verdict", "data_sha256", "base_model", "base_revision",
    "svd_engine_version",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SteeringConfig:
    """strength (mu), alpha and penalty of (13)-(14); the other fields record the calibration."""

    strength: float
    alpha: float = 0.1
    penalty: float = -math.inf
    direction: str = "projected"  # delta (10), or "difference": the gradient (7) less its mean
    objective: str | None = None
    estimator: str | None = None
    interval: tuple[float, float] | None = None  # 95 % bootstrap interval of the strength
    verdict: str | None = None
    data_sha256: str | None = None  # of the calibration examples
    vocab_size: int | None = None
    base_model: str | None = None
    base_revision: str | None = None
    svd_engine_version: str | None = None

    def __post_init__(self) -> None:
        for name, value in (
            ("strength", self.strength), ("alpha", self.alpha),
            *(("interval", end) for end in self.interval or ()),
        ):  # fmt: skip
            _check_number(name, value)
        if self.penalty != -math.inf:
            _check_number("penalty", self.penalty)
        checks.support(self.alpha, self.penalty)
        if self.interval is not None and len(self.interval) != 2:
            raise ValueError(f"interval must be a pair of numbers; got {self.interval!r}.")
        checks.check_direction(self.direction)
        if self.vocab_size is not None and not isinstance(self.vocab_size, int):
            raise ValueError(f"vocab_size must be an integer; got {self.vocab_size!r}.")
        for name in TEXTS:
            value = getattr(self, name)
            if not isinstance(value, str | None):
                raise ValueError(f"{name} must be text; got {value!r}.")

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the file into an adapter's folder, for both uses, and return its path."""
        return Steering(self, self).save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "SteeringConfig":
        """Read the steering of generation, as `Steering.from_pretrained` does that of both uses."""
        config = Steering.from_pretrained(folder).generation
        if config is None:
            raise ValueError(
                f"{Path(folder) / FILE_NAME} holds no strength for generation. Write one with "
                "`svd-engine calibrate --use generation`."
            )
        return config

    def fits(self, vocab_size: int | None) -> bool:
        """Whether the strength may serve a model of this vocabulary, as far as both are known."""
        return None in (self.vocab_size, vocab_size) or self.vocab_size == vocab_size

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError if the strength was calibrated for another vocabulary."""
        if not self.fits(vocab_size):
            raise ValueError(
                f"{FILE_NAME} was calibrated for a vocabulary of {self.vocab_size} tokens; the "
                f"model has {vocab_size}. Calibrate again with this model."
            )


@dataclass(frozen=True, slots=True)
class Steering:
    """One steering for each use. A use without one decodes the adapted model alone."""

    generation: SteeringConfig | None = None
    ranking: SteeringConfig | None = None

    def __post_init__(self) -> None:
        for use in USES:
            if not isinstance(value := getattr(self, use), SteeringConfig | None):
                raise ValueError(f"{use} must be a SteeringConfig; got {value!r}.")

    @classmethod
    def of(cls, value: "Steering | SteeringConfig | None") -> "Steering":
        """Return a steering of both uses; a `SteeringConfig` serves both. Raises ValueError."""
        if isinstance(value, SteeringConfig):
            return cls(value, value)
        if value is not None and not isinstance(value, Steering):
            raise ValueError(
                f"steering must be a SteeringConfig or a Steering; got {value!r}. For a strength "
                "alone: SteeringConfig(strength=-4.0)."
            )
        return value or cls()

    def uses(self) -> dict[str, SteeringConfig]:
        """The steering of every use that has one."""
        found = {use: getattr(self, use) for use in USES}
        return {use: config for use, config in found.items() if config is not None}

    def describe(self) -> str:
        """Say strength and alpha of each use, for a `repr`."""
        found = {u: f"(strength={x.strength}, alpha={x.alpha})" for u, x in self.uses().items()}
        if len(found) == len(USES) and len(set(found.values())) == 1:
            return found[USES[0]]
        return ", ".join(f"{use} {text}" for use, text in found.items()) or "None"

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError if a strength was calibrated for another vocabulary."""
        for config in self.uses().values():
            config.check_vocabulary(vocab_size)

    def to_json(self) -> str:
        """The text of the file: one object for both uses if they are the same, else one each."""
        if not self.uses():
            raise ValueError("there is no strength to write; calibrate first.")
        values = {use: _plain(config) for use, config in self.uses().items()}
        kept = values["generation"] if self.generation == self.ranking else values
        return json.dumps(kept, indent=2) + "\n"

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the file into an adapter's folder and return its path."""
        path = Path(folder) / FILE_NAME
        write_text(path, self.to_json())
        return path

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Steering":
        """Read the file from a folder, or from an adapter on the Hub if no such folder exists.

        One object without uses serves both; one that was fitted to rank serves only ranking.
        Raises ValueError.
        """
        from svd_engine import hub  # the operators alone do not need it

        hub.check_name("folder", folder)
        is_here = Path(folder).is_dir()
        path = (Path(folder) if is_here else hub.adapter_folder(folder)) / FILE_NAME
        if not path.is_file():
            raise ValueError(f"{path} does not exist. Write it with `svd-engine calibrate`.")
        values = read_object(path, "a steering configuration")
        try:
            return cls.from_values(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a steering configuration: {error}") from error

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "Steering":
        """Read what `to_json` writes, parsed. Raises TypeError or ValueError."""
        if values.keys() & set(USES):
            return cls(**{use: _config(values[use]) for use in USES if use in values})
        config = _config(values)
        return cls(None if config.objective == "ranking" else config, config)


def _plain(config: SteeringConfig) -> dict[str, Any]:
    known = {k: v for k, v in asdict(config).items() if v is not None}
    if known["penalty"] == -math.inf:
        known["penalty"] = "-inf"  # JSON has no infinity
    return known


def _config(values: Any) -> SteeringConfig:
    if not isinstance(values, dict):
        raise ValueError(f"a strength is an object; got {values!r}.")
    values = dict(values)
    if values.get("penalty") == "-inf":
        values["penalty"] = -math.inf
    if values.get("interval") is not None:
        values["interval"] = tuple(values["interval"])
    if "projection" in values:  # of files from before there was a direction
        values.setdefault("direction", _direction(values["projection"]))
    known = {field.name for field in fields(SteeringConfig)}
    return SteeringConfig(**{k: v for k, v in values.items() if k in known})


def _direction(projection: Any) -> str:
    if not isinstance(projection, bool):
        raise ValueError(f"projection must be true or false; got {projection!r}.")
    return "projected" if projection else "difference"


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number; got {value!r}.")
    checks.number(name, value)
