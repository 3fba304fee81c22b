"""What a calibration found, and how it is kept beside the adapter."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from svd_engine.utils import plots
from svd_engine.utils.files import write_text

REPORT_FILE = "calibration.json"
PLOT_FILE = "calibration.png"


@dataclass
class CalibrationReport:
    """The estimate and what it is worth. Losses are means, in nats, on examples not fitted."""

    objective: str
    length_normalised: bool
    projection: bool
    estimator: str
    hessian: str
    alpha: float
    alpha_losses: list[tuple[float, float]]  # (alpha, held-out loss) of every candidate
    strength: float
    interval: tuple[float, float]  # 95 % bootstrap
    optimum: float  # the exact optimum of the objective
    likelihood_strength: float  # the exact optimum of the right answers' likelihood
    estimates: dict[str, float]  # of (44)-(46), by estimator and Hessian
    loss_before: float  # of the objective at strength 0
    loss_after: float
    gain_interval: tuple[float, float]  # of loss_before - loss_after
    nll_before: float  # per token of the right answers
    nll_after: float
    support_share: float  # of the right answers' tokens that lie in the support
    single_share: float  # of positions whose support is one token
    examples: int
    tokens: int
    at_bracket: bool  # the strength is at the end of what was searched
    verdict: str
    worthwhile: bool
    curve: list[tuple[float, float]]  # (mu, loss on all examples)

    @property
    def loss_name(self) -> str:
        return "NLL a token" if self.objective == "nll" else f"{self.objective} loss"

    def save(self, folder: str | Path) -> Path:
        """Write calibration.json into an adapter's folder; calibration.png if it can be drawn."""
        folder = Path(folder)
        write_text(folder / REPORT_FILE, json.dumps(asdict(self), indent=2) + "\n")
        plots.calibration(
            folder / PLOT_FILE, self.curve, self.optimum, self.interval, self.estimates,
            f"{self.loss_name} (nats)",
        )  # fmt: skip
        return folder / REPORT_FILE


def verdict(gain: tuple[float, float]) -> str:
    """In words, what the interval of the held-out gain says."""
    if gain[0] > 0:
        return "use it: held-out examples gain, and the interval of the gain is above 0"
    if gain[1] < 0:
        return "do not use it: held-out examples lose"
    return "indifferent: the interval of the held-out gain contains 0; leave steering off"
