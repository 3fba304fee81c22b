"""The verdict of a calibration: "use it", or which of its conditions fail."""

from dataclasses import dataclass

MIN_EXAMPLES = 20  # resamples of fewer say little about new ones
NLL_ALLOWED = 0.02  # nats a token that the likelihood may fall where the strength is for generation
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a verdict rests on. Figures of steering are held out; intervals are of 95 %."""

    use: str
    examples: int
    interval: Interval  # of the strength
    gain: Interval  # of the loss at strength 0 minus that steered
    nll_change: float  # by steering, per token of the right answers
    behind_base: Interval  # of the steered model's loss minus the base's: NLL for generation
    adapted_behind_base: Interval  # of the same for the adapted model
    at_bracket: bool  # the strength is at the end of the search


def failures(evidence: Evidence) -> list[str]:
    """Say which conditions of "use it" fail."""
    low, high = evidence.interval
    failed = []
    if evidence.gain[1] < 0:
        failed.append("held-out examples lose")
    elif evidence.gain[0] <= 0:
        failed.append("the interval of the held-out gain contains 0")
    if low <= 0 <= high:
        failed.append("the interval of the strength contains 0")
    if evidence.use == "generation" and evidence.nll_change > NLL_ALLOWED:
        failed.append(
            f"the likelihood falls by {evidence.nll_change:.2f} nats a token, more than "
            f"{NLL_ALLOWED}"
        )
    if evidence.behind_base[0] > 0:
        failed.append("the base alone does better than the steered model")
    if evidence.examples < MIN_EXAMPLES:
        failed.append(f"{evidence.examples} examples are too few, it takes {MIN_EXAMPLES}")
    return failed


def warnings(evidence: Evidence) -> list[str]:
    """Say what is odd about a calibration, whatever its verdict."""
    said = []
    if evidence.adapted_behind_base[0] > 0:
        said.append("the adapter is worse than its base")
    if evidence.at_bracket:
        said.append("the strength is at the end of the search: further out the loss may be lower")
    return said


def verdict(evidence: Evidence) -> str:
    """Say in words what to do, and why not."""
    failed = failures(evidence)
    if not failed:
        return "use it: held-out examples gain, and the interval of the gain is above 0"
    harms = evidence.gain[1] < 0 or any("likelihood" in x or "base" in x for x in failed)
    return f"{'do not use it' if harms else 'indifferent'}: {'; '.join(failed)}"
