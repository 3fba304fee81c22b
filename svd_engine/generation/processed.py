"""The logits that tokens are chosen by, where constraints or processors change the steered ones."""

from collections.abc import Sequence

from torch import Tensor

from svd_engine.generation.constrained import Row
from svd_engine.generation.distribution import steered_logits
from svd_engine.generation.request import Request
from svd_engine.model.pair import PerModel


def is_plain(request: Request) -> bool:
    """Whether nothing changes the steered logits."""
    return request.constrain is None and request.process_logits is None


def processed(
    request: Request, rows: Sequence[Row], logits: PerModel, *, as_logprobs: bool = False
) -> Tensor:
    """Steered logits `[R, V]` after constraints and then processors, in float32.

    as_logprobs: begin with log-probabilities, as beam search does.
    """
    scores = steered_logits(logits, request.steering)
    if as_logprobs:
        scores = scores.log_softmax(-1)
    if request.constrain is not None:
        adapted = logits[0].float()
        scores = request.constrain(
            rows, scores, adapted.log_softmax(-1) if as_logprobs else adapted
        )
    if request.process_logits is not None:
        scores = request.process_logits([row.all_ids for row in rows], scores)
    return scores
