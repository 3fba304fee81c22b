"""CalibrationOptions: how to fit a strength, checked once and handed whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, TypedDict, Unpack

from svd_engine.calibration.estimators import ESTIMATORS, HESSIANS
from svd_engine.calibration.objectives import OBJECTIVES
from svd_engine.data.tokenization import as_list
from svd_engine.ops import checks
from svd_engine.steering_config import USES
from svd_engine.utils.arguments import count, number

AUTO = "auto"
AUTO_ALPHAS = (0.01, 0.1, 0.3)
# (objective, length_normalised) of objective="auto"; the first is the most cautious.
AUTO_OBJECTIVES = {
    "generation": (("nll", False), ("preference", True), ("preference", False)),
    "ranking": (("ranking", True), ("ranking", False), ("preference", True)),
}


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
    alpha: float | Sequence[float] | None


class Candidate(NamedTuple):
    """What one fit minimises, and along which direction and at which alpha."""

    objective: str
    length_normalised: bool
    direction: str
    alpha: float


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """What to minimise, how to estimate the strength, and how to hold examples out.

    use: "generation" or "ranking", which the strength is for. objective: "preference", "ranking",
    for ranking only, or "nll". estimator: "exact", the optimum of the objective,
    or "mean", "median", "trimmed" or "ratio" of the right answers' tokens (44)-(46) with the
    denominator `hessian`: "gauss-newton" (20) or "newton" (19). direction: "projected"
    (10), "difference", the gradient (7) minus its mean, or "auto", either, which is chosen with the
    alpha and, if that is "auto", the objective. folds: of the cross-validation over examples, which
    chooses among candidates.
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

    @property
    def directions(self) -> tuple[str, ...]:
        return ("projected", "difference") if self.direction == AUTO else (self.direction,)

    @property
    def measure(self) -> tuple[str, bool]:
        """Objective and length_normalised of the loss that judges every candidate.

        Objectives are compared by the share of pairs that `engine.score` puts in the wrong order.
        """
        own = self.objective, self.length_normalised
        return ("ranking", False) if self.objective == AUTO else own

    @property
    def guards_choice(self) -> bool:
        """Whether a candidate under which the likelihood falls may not be chosen."""
        return self.direction == AUTO and self.use == "generation"

    def candidates(self) -> list[Candidate]:
        """Every objective, direction and alpha to choose from."""
        own = ((self.objective, self.length_normalised),)
        objectives = AUTO_OBJECTIVES[self.use] if self.objective == AUTO else own
        return [
            Candidate(*objective, direction, alpha)
            for objective in objectives
            for direction in self.directions
            for alpha in self.alphas
        ]

    @classmethod
    def checked(
        cls,
        wrong: Sequence[Sequence[Any]],
        use: str | None = None,
        objective: str | None = None,
        alpha: float | Sequence[float] | None = None,
        **kept: Unpack[_Kept],
    ) -> "CalibrationOptions":
        """Check the options against the examples to calibrate on. Raises ValueError.

        wrong: the rejected answers of each example, in any form. use: None is generation, or
        ranking if that is the objective. objective: None is ranking for ranking; for generation
        preference if any example has rejected answers, otherwise nll; with direction="auto" and
        rejected answers it is "auto". alpha: None is 0.1, or several to choose from with
        direction="auto".
        """
        is_auto = kept.get("direction") == AUTO
        if use is None:
            use = "ranking" if objective == "ranking" else "generation"
        if objective is None:
            objective = "preference" if any(wrong) else "nll"
            objective = "ranking" if use == "ranking" else objective
            objective = AUTO if is_auto and any(wrong) else objective
        if alpha is None:
            alpha = AUTO_ALPHAS if is_auto else 0.1
        given = (
            [alpha] if isinstance(alpha, Real) else as_list(alpha, "alpha", "a number or several")
        )
        alphas = tuple(number("alpha", one) for one in given)
        options = cls(objective, alphas=alphas, use=use, **kept)
        for name, value, known in (
            ("use", use, USES),
            ("objective", objective, (*OBJECTIVES, AUTO) if is_auto else OBJECTIVES),
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
        if not is_auto:
            checks.check_direction(options.direction)
        elif options.estimator != "exact":
            raise ValueError("direction='auto' compares exact optima; leave out estimator.")
        if not alphas or not max(alphas) <= 1:
            raise ValueError(f"alpha must lie in (0, 1], one number or several; got {alpha}.")
        if not min(alphas) > 0:
            raise ValueError(
                f"alpha must lie in (0, 1] to calibrate; got {min(alphas)}. A small one, such as "
                "0.001, keeps nearly every token that matters."
            )
        if objective != "nll":
            for i, rejected in enumerate(wrong):
                if not rejected:
                    raise ValueError(f"examples[{i}] has no rejected answers to prefer against.")
        if options.length_normalised and objective == AUTO:
            raise ValueError("objective='auto' chooses it; leave out length_normalised.")
        if options.length_normalised and objective == "nll":
            raise ValueError("length_normalised compares answers; objective='nll' does not.")
        count("seed", options.seed, most=2**64 - 1)
        if not 2 <= count("folds", options.folds) <= len(wrong):
            raise ValueError(
                f"folds must lie in [2, number of examples = {len(wrong)}]; got {options.folds}."
            )
        return options
