"""A caller's logits processors, applied to steered logits."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from svd_engine.data.tokenization import as_list

# (prompt and generated ids of each batch row, scores float32 [R, V]) -> scores [R, V]
LogitsProcess = Callable[[list[list[int]], Tensor], Tensor]


def build(
    processors: Sequence[LogitsProcessor] | None, repetition_penalty: float
) -> LogitsProcess | None:
    """The processors in their order; None if there are none. Raises ValueError."""
    chain = LogitsProcessorList()
    for processor in as_list(() if processors is None else processors, "logits_processor"):
        if not callable(processor):
            raise ValueError(
                "logits_processor must be a list of transformers.LogitsProcessor; it holds a "
                f"{type(processor).__name__}."
            )
        if repetition_penalty != 1 and isinstance(processor, RepetitionPenaltyLogitsProcessor):
            raise ValueError("repetition_penalty is given twice, also in logits_processor.")
        chain.append(processor)
    return _for_ragged_rows(chain) if chain else None


def _for_ragged_rows(chain: LogitsProcessorList) -> LogitsProcess:
    def apply(rows: list[list[int]], scores: Tensor) -> Tensor:
        ids: Any = torch.tensor(rows, device=scores.device)
        return chain(ids, scores)

    def process_logits(rows: list[list[int]], scores: Tensor) -> Tensor:
        """Process rows of one length together, ragged rows one by one: none sees padding."""
        if len({len(row) for row in rows}) == 1:
            return apply(rows, scores)
        return torch.cat([apply([row], scores[i : i + 1]) for i, row in enumerate(rows)])

    return process_logits
