"""Steering for decoders that accept only a logits processor."""

import inspect
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel, PeftModelForCausalLM
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor

from svd_engine import ops
from svd_engine.generation import distribution
from svd_engine.model import probe
from svd_engine.model.layers import longrope
from svd_engine.model.pair import PerModel, SequentialRunner, adapted_runner, base_runner
from svd_engine.model.peft_adapter import Adapter
from svd_engine.steering_config import SteeringConfig


class SteeringLogitsProcessor(LogitsProcessor):
    """Steered logits  (12)-(14)  from the scores of the adapted model, which generates.

    The processor runs the base model with its own KV cache: two passes per token, where
    `steered_generate` needs one, but it works with beams and whatever else accepts processors. Put
    it before all others. With beams, pass `renormalize_logits=True`, so that steered
    log-probabilities add up.

    Left-padded prompts need `attention_mask`, that of the prompts to come, or `pad_token_id`, which
    counts as padding wherever a row begins with it.
    """

    def __init__(
        self,
        model: PeftModel,
        steering: SteeringConfig,
        *,
        attention_mask: Tensor | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        adapter = Adapter.read(model)
        if adapter.virtual_tokens and not virtual_tokens_survive():
            raise ValueError(
                "model has virtual tokens, which generate loses after its first step with "
                f"transformers {transformers.__version__} and peft {peft.__version__}. Use other "
                "versions, or custom_generate=steered_generate."
            )
        steering.check_vocabulary(model.config.get_text_config().vocab_size)
        if attention_mask is not None and pad_token_id is not None:
            raise ValueError("give attention_mask or pad_token_id; got both.")
        self.steering, self.pad_token_id = steering, pad_token_id
        self._pads = None if attention_mask is None else left_pads(attention_mask)
        self._state = adapter.state
        self._base = SequentialRunner(base_runner(adapter))
        probe.check(SequentialRunner(adapted_runner(adapter), *self._base.runners), adapter, model)
        self._rows: list[list[int]] = []  # token ids that the KV cache holds
        self._max_rows = self._steps = 0  # rows and further steps that fit the KV cache

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Return steered logits `[R, V]` from input_ids `[R, n]` and the adapted model's scores."""
        base = self._base_logits(self._unpadded(input_ids)).to(scores.device)
        drawn_from = distribution.steered((scores, base), self.steering)
        return ops.steer(*drawn_from.operands, **drawn_from.mask).to(scores.dtype)

    @torch.inference_mode()
    def _base_logits(self, rows: list[list[int]]) -> Tensor:
        logits = self._step(rows) or self._prefill(rows)
        self._rows = rows
        return logits[0]

    def _step(self, rows: list[list[int]]) -> PerModel | None:
        """Decode one more token per row, or return None unless every row continues a cached row."""
        before = [row[:-1] for row in rows]
        if not self._steps or len(rows) > self._max_rows:
            return None
        config = self._base.runners[0].model.config
        if any(longrope.changes(config, len(row) - 1, len(row)) for row in rows):
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
        """Prefill the rows anew, with slots for as many tokens again.

        Raise ValueError if the base model is not what it was.
        """
        self._state.check_base()
        self._max_rows, self._steps = len(rows), max(256, *map(len, rows))
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


def virtual_tokens_survive() -> bool:
    """Tell whether PEFT's `generate` sees the KV cache that holds its virtual tokens.

    transformers 5.24 renamed the argument; PEFT looks it up by name.
    """
    renamed = "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    prepare: Any = PeftModelForCausalLM.prepare_inputs_for_generation
    return not renamed or "cache" in prepare.__code__.co_consts


def left_pads(attention_mask: Tensor) -> tuple[int, list[int]]:
    """Return width and pads per row of a mask `[B, n]`. Raise ValueError unless left-padded."""
    mask = attention_mask.bool()
    pads = (~mask).sum(-1) if mask.dim() == 2 else None
    if pads is None or not mask.any(-1).all() or (mask.sort(-1).values != mask).any():
        raise ValueError(
            f"attention_mask must be [B, n] with its zeros on the left and a one in every row; got "
            f"{attention_mask}. Set tokenizer.padding_side = 'left'."
        )
    return mask.shape[1], pads.tolist()
