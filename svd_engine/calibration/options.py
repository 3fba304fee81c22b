"""CalibrationOptions: how to fit a strength, checked once and handed whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

from svd_engine.calibration.estimators import ESTIMATORS, HESSIANS
from svd_engine.calibration.objectives import OBJECTIVES, Answers
from svd_engine.ops import checks
from svd_engine.steering_config import USES


class _Kept(TypedDict, total=False):
    """Keywords that become fields as they are."""

    estimator: str
    hessian: str
    length_normalised: bool
    direction: str
    folds: int
    seed: int


class CalibrationKeywords(_Kept, total=False):
    """The options as a caller gives them; `CalibrationOptions` has their meaning and defaults."""

    use: str | None
    objective: str | None
    alpha: float | Sequence[float]


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """What to minimise, how to estimate the strength, and how to hold examples out.

    use: "generation" or "ranking", which the strength is for. objective: "preference", "ranking",
    for ranking only, or "nll". estimator: "exact", the optimum of the objective,
    or "mean", "median", "trimmed" or "ratio" of the right answers' tokens (44)-(46) with the
    denominator `hessian`: "gauss-newton" (20) or "newton" (19). direction: "projected"
    (10), or "difference", the gradient (7) minus its mean. folds: of the cross-validation over
    examples, which also chooses alpha.
    """

    objective: str
    estimator: str = "exact"
    hessian: str = "gauss-newton"
    alphas: tuple[float, ...] = (0.1,)  # one, or several to choose from
    length_normalised: bool = False  # compare answers by their log-probability per token
    direction: str = "projected"
    folds: int = 5
    seed: int = 0
    use: str = "generation"

    @classmethod
    def checked(
        cls,
        answers: Answers,
        use: str | None = None,
        objective: str | None = None,
        alpha: float | Sequence[float] = 0.1,
        **kept: Unpack[_Kept],
    ) -> "CalibrationOptions":
        """Check the options against the answers to calibrate on. Raises ValueError.

        use: None is generation, or ranking if that is the objective. objective: None is ranking
        for ranking; for generation preference if any example has rejected answers, otherwise nll.
        """
        if use is None:
            use = "ranking" if objective == "ranking" else "generation"
        if objective is None:
            objective = "preference" if any(answers.wrong) else "nll"
            objective = "ranking" if use == "ranking" else objective
        alphas = tuple(float(a) for a in ([alpha] if isinstance(alpha, int | float) else alpha))
        options = cls(objective, alphas=alphas, use=use, **kept)
        for name, value, known in (
            ("use", use, USES),
            ("objective", objective, OBJECTIVES),
            ("estimator", options.estimator, ESTIMATORS),
            ("hessian", options.hessian, HESSIANS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}.")
        if (use, objective) == ("generation", "ranking"):
            raise ValueError(
                "objective='ranking' orders answers and is no measure of texts; give "
                "use='ranking', or another objective."
            )
        checks.check_direction(options.direction)
        if not alphas or not max(alphas) <= 1:
            raise ValueError(f"alpha must lie in (0, 1], one number or several; got {alpha}.")
        if objective != "nll":
            for i, wrong in enumerate(answers.wrong):
                if not wrong:
                    raise ValueError(f"examples[{i}] has no rejected answers to prefer against.")
        elif options.length_normalised:
            raise ValueError("length_normalised compares answers; objective='nll' does not.")
        if not isinstance(options.seed, int) or options.seed < 0:
            raise ValueError(f"seed must be an integer >= 0; got {options.seed!r}.")
        examples = len(answers.right)
        if not 2 <= options.folds <= examples:
            raise ValueError(
                f"folds must lie in [2, number of examples = {examples}]; got {options.folds}."
            )
        return options
