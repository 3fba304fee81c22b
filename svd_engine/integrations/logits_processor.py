"""Steering as a logits processor, for any decoder that takes one."""

import torch
from peft import PeftModel
from torch import Tensor
from transformers import LogitsProcessor

from svd_engine import ops
from svd_engine.generation import distribution
from svd_engine.model import peft_adapter
from svd_engine.model.pair import PerModel, SequentialRunner, base_runner
from svd_engine.steering_config import SteeringConfig


class SteeringLogitsProcessor(LogitsProcessor):
    """Steered logits  (12)-(14)  from the scores of the adapted model, which generates.

    The base model runs its own pass with a KV cache: two passes per token, where `steered_generate`
    needs one, but it works with beams and anything else that takes processors. Put it before all
    others. With beams pass `renormalize_logits=True`, so that steered log-probabilities add up.

    Left-padded prompts need `attention_mask`, that of the prompts to come, or `pad_token_id`: rows
    are then stripped of it at their start.
    """

    def __init__(
        self,
        model: PeftModel,
        steering: SteeringConfig,
        *,
        attention_mask: Tensor | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        if not isinstance(model, PeftModel):
            raise ValueError(f"model must be a PeftModel; got {type(model).__name__}.")
        peft_adapter.check_recoverable(model)
        steering.check_vocabulary(model.config.get_text_config().vocab_size)
        if attention_mask is not None and pad_token_id is not None:
            raise ValueError("give attention_mask or pad_token_id; got both.")
        self.steering, self.pad_token_id = steering, pad_token_id
        self._pads = None if attention_mask is None else left_pads(attention_mask)
        self._base = SequentialRunner(base_runner(model))
        self._rows: list[list[int]] = []  # token ids in the cache
        self._room = self._steps = 0  # rows and further tokens that fit in the cache

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """input_ids `[R, n]`, scores `[R, V]` of the adapted model -> steered logits `[R, V]`."""
        base = self._base_logits(self._unpadded(input_ids)).to(scores.device)
        drawn_from = distribution.steered((scores, base), self.steering)
        return ops.steer(*drawn_from.operands, **drawn_from.mask).to(scores.dtype)

    @torch.inference_mode()
    def _base_logits(self, rows: list[list[int]]) -> Tensor:
        logits = self._step(rows) or self._prefill(rows)
        self._rows = rows
        return logits[0]

    def _step(self, rows: list[list[int]]) -> PerModel | None:
        """Feed one more token per row, if every row continues a row of the cache."""
        before = [row[:-1] for row in rows]
        if not self._steps or len(rows) > self._room:
            return None
        if before != self._rows:
            place = {tuple(row): i for i, row in enumerate(self._rows)}
            index = [place.get(tuple(row), -1) for row in before]
            if -1 in index:
                return None
            self._base.reorder(torch.tensor(index, device=self._base.device))
        self._steps -= 1
        return self._base.step(torch.tensor([row[-1] for row in rows], device=self._base.device))

    def _prefill(self, rows: list[list[int]]) -> PerModel:
        """Read all rows, with room for as many tokens again."""
        self._room, self._steps = len(rows), max(256, *map(len, rows))
        return self._base.logits(self._base.prefill(rows, self._steps))

    def _unpadded(self, input_ids: Tensor) -> list[list[int]]:
        rows = input_ids.tolist()
        if self._pads is not None:
            width, pads = self._pads
            copies, rest = divmod(len(rows), len(pads))
            if rest or input_ids.shape[1] < width:
                raise ValueError(
                    f"attention_mask is [{len(pads)}, {width}]; input_ids came as "
                    f"{list(input_ids.shape)}. Make a processor for these prompts."
                )
            return [row[pads[i // copies] :] for i, row in enumerate(rows)]
        if self.pad_token_id is None:
            return rows
        starts = (
            next((i for i, token in enumerate(row) if token != self.pad_token_id), len(row) - 1)
            for row in rows
        )
        return [row[start:] for row, start in zip(rows, starts, strict=True)]


def left_pads(attention_mask: Tensor) -> tuple[int, list[int]]:
    """Width of a mask `[B, n]` and number of pads per row; ValueError unless left-padded."""
    mask = attention_mask.bool()
    pads = (~mask).sum(-1) if mask.dim() == 2 else None
    if pads is None or not mask.any(-1).all() or (mask.sort(-1).values != mask).any():
        raise ValueError(
            f"attention_mask must be [B, n] with its zeros on the left and a one in every row; got "
            f"{attention_mask}. Set tokenizer.padding_side = 'left'."
        )
    return mask.shape[1], pads.tolist()
