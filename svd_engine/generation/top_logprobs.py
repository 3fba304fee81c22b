"""The k best tokens per row, of the distribution decoded and of each model alone."""

from svd_engine import ops
from svd_engine.generation.distribution import Distribution, unsteered
from svd_engine.generation.outputs import TopLogprobs
from svd_engine.model.pair import PerModel


def top_logprobs(
    k: int, model: str, logits: PerModel, drawn_from: Distribution
) -> list[TopLogprobs]:
    """Per row, the k best of `drawn_from`, under the name `model`.

    If `model` is "steered", also those of the adapted and the base model.
    """
    distributions = {model: drawn_from}
    if model == "steered":
        adapted, base = logits
        distributions |= {"adapted": unsteered(adapted), "base": unsteered(base)}
    rows: list[TopLogprobs] = [{} for _ in range(len(logits[0]))]
    for name, each in distributions.items():
        best = ops.topk(*each.operands, k, **each.mask)
        pairs = zip(best.token.tolist(), best.logprob.tolist(), strict=True)
        for row, (tokens, logprobs) in zip(rows, pairs, strict=True):
            row[name] = list(zip(tokens, logprobs, strict=True))
    return rows
