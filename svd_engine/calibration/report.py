"""CalibrationReport: the result of a calibration, and the files that keep it beside the adapter."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from svd_engine import __version__, steering_config
from svd_engine.calibration.text_check import TextCheck
from svd_engine.data import contamination
from svd_engine.steering_config import Steering, SteeringConfig
from svd_engine.utils import plots
from svd_engine.utils.files import write_together

FILES = {"generation": "calibration", "ranking": "calibration-ranking"}  # .json and .png


@dataclass
class CalibrationReport:
    """The strength and what it is worth. Losses are means, in nats, on held-out examples."""

    use: str  # "generation" or "ranking"
    objective: str
    length_normalised: bool
    direction: str
    estimator: str
    hessian: str
    alpha: float
    alpha_losses: list[tuple[float, float]]  # (alpha, held-out loss) of every candidate
    measure: str  # the objective whose loss the figures below are of; not always the one fitted
    candidates: list[dict[str, Any]]  # every candidate with its held-out gain
    strength: float
    interval: tuple[float, float]  # 95 % bootstrap
    optimum: float  # the exact optimum of the objective
    likelihood_strength: float  # the exact optimum of the right answers' likelihood
    estimates: dict[str, float]  # of (44)-(46), by estimator and Hessian
    loss_base: float  # of the base
    loss_before: float  # at strength 0
    loss_after: float
    gain_interval: tuple[float, float]  # of loss_before - loss_after
    nll_base: float  # per token of the right answers
    nll_before: float
    nll_after: float
    support_share: float  # share of the right answers' tokens that lie in the support
    single_share: float  # share of positions whose support is one token
    examples: int
    tokens: int
    at_bracket: bool  # the strength is at the end of the search range
    verdict: str
    failures: list[str]  # the conditions of "use it" that fail
    warnings: list[str]
    worthwhile: bool
    curve: list[tuple[float, float]]  # (strength, loss on all examples)
    texts: TextCheck | None = None  # at the strength; for generation

    @property
    def loss_name(self) -> str:
        """The name of the loss that the figures are of."""
        return _loss_name(self.measure)

    def to_steering_config(
        self,
        *,
        force: bool = False,
        data_sha256: str | None = None,
        vocab_size: int | None = None,
        base_model: str | None = None,
        base_revision: str | None = None,
    ) -> SteeringConfig:
        """Return the steering that the report supports: strength 0 without a gain, unless forced.

        The other arguments record the examples and the model of the calibration.
        """
        return SteeringConfig(
            strength=self.strength if self.worthwhile or force else 0.0,
            alpha=self.alpha,
            direction=self.direction,
            objective=self.objective,
            estimator=self.estimator,
            interval=self.interval,
            verdict=self.verdict,
            data_sha256=data_sha256,
            vocab_size=vocab_size,
            base_model=base_model,
            base_revision=base_revision,
            svd_engine_version=__version__,
        )

    def save(self, folder: str | Path) -> Path:
        """Write the report into a folder, with a plot if there is matplotlib; return its path."""
        contents = self.files(Path(folder))
        write_together(contents)
        return next(iter(contents))

    def files(self, folder: Path) -> dict[Path, bytes]:
        """The contents of calibration.json, or calibration-ranking.json, and of the plot."""
        report, plotted = (folder / f"{FILES[self.use]}.{kind}" for kind in ("json", "png"))
        contents = {report: (json.dumps(asdict(self), indent=2) + "\n").encode()}
        label = f"{_loss_name(self.objective)} (nats)"
        plot = plots.calibration(self.curve, self.optimum, self.interval, self.estimates, label)
        return contents | ({} if plot is None else {plotted: plot})


def save(
    adapter: str | Path,
    report: CalibrationReport,
    steering: Steering,
    examples: Sequence[Mapping[str, Any]],
) -> Path:
    """Write a calibration into the adapter's folder; return the path of steering_config.json.

    Of `steering` it takes the strength for the report's use; what the file holds for the other use
    stays, unless that is of another vocabulary. Beside it go the report and the hashes of the
    examples' prompts, so that `svd-engine evaluate` can refuse questions that the strength was
    fitted on. Nothing changes if one cannot be written. Raises ValueError.
    """
    folder = Path(adapter)
    path = folder / steering_config.FILE_NAME
    found = Steering.from_pretrained(folder).uses() if path.is_file() else {}
    made = steering.uses()[report.use]
    kept = {use: config for use, config in found.items() if config.fits(made.vocab_size)}
    seen = contamination.with_kind(
        folder, contamination.CALIBRATION[report.use], contamination.prompts(examples)
    )
    write_together(
        report.files(folder)
        | {
            folder / contamination.FILE_NAME: seen.encode(),
            path: Steering(**kept | {report.use: made}).to_json().encode(),
        }
    )
    return path


def _loss_name(objective: str) -> str:
    return "NLL per token" if objective == "nll" else f"{objective} loss"
