"""SteeringConfig: how to steer, stored as `steering_config.json` beside `adapter_config.json`."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from svd_engine.ops import checks
from svd_engine.utils.files import read_object, write_text

FILE_NAME = "steering_config.json"
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
    projection: bool = True  # False: the gradient (7) minus its mean instead of delta (10)
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
        if not isinstance(self.projection, bool):
            raise ValueError(f"projection must be True or False; got {self.projection!r}.")
        if self.vocab_size is not None and not isinstance(self.vocab_size, int):
            raise ValueError(f"vocab_size must be an integer; got {self.vocab_size!r}.")
        for name in TEXTS:
            value = getattr(self, name)
            if not isinstance(value, str | None):
                raise ValueError(f"{name} must be text; got {value!r}.")

    def to_json(self) -> str:
        """The text of the file."""
        known = {k: v for k, v in asdict(self).items() if v is not None}
        if known["penalty"] == -math.inf:
            known["penalty"] = "-inf"  # JSON has no infinity
        return json.dumps(known, indent=2) + "\n"

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the file into an adapter's folder and return its path."""
        path = Path(folder) / FILE_NAME
        write_text(path, self.to_json())
        return path

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "SteeringConfig":
        """Read the file from a folder, or from a Hub repository if no such folder exists."""
        path = Path(folder) / FILE_NAME
        if not Path(folder).is_dir():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(folder), FILE_NAME))
        if not path.is_file():
            raise ValueError(f"{path} does not exist. Write it with `svd-engine calibrate`.")
        values = read_object(path, "a steering configuration")
        if values.get("penalty") == "-inf":
            values["penalty"] = -math.inf
        try:
            if values.get("interval") is not None:
                values["interval"] = tuple(values["interval"])
            known = {field.name for field in fields(cls)}
            return cls(**{k: v for k, v in values.items() if k in known})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a steering configuration: {error}") from error

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError if the strength was calibrated for another vocabulary."""
        if self.vocab_size is not None and self.vocab_size != vocab_size:
            raise ValueError(
                f"{FILE_NAME} was calibrated for a vocabulary of {self.vocab_size} tokens; the "
                f"model has {vocab_size}. Calibrate again with this model."
            )


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number; got {value!r}.")
    checks.number(name, value)
