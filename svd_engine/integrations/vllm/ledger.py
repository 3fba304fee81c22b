"""The choice of each row of a batch, kept by vLLM's logits processor of runner V1.

vLLM tells a processor, ahead of every forward pass, which request sits in which row. This one
leaves logits alone: `compute_logits` asks it, so that log-probabilities, penalties, grammars and
cuts all see steered logits.
"""

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as LogitsProcessorV2,
)

from svd_engine.integrations.vllm import requests
from svd_engine.integrations.vllm.steering import Rows, SteeredLogits

_ledgers: "WeakValueDictionary[str, Ledger]" = WeakValueDictionary()  # by engine


class Ledger(LogitsProcessor, LogitsProcessorV2):
    """For runner V2, whose choices `model_state` keeps, it only checks requests."""

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        self.steered: SteeredLogits | None = None
        self.device = torch.device(vllm_config.device_config.device)
        self.choices: dict[int, requests.Choice] = {}
        self.rows = Rows(0.0)
        _ledgers[vllm_config.instance_id] = self

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        requests.check(sampling_params)

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if self.steered is None:
            return
        if batch_update is not None:
            default = self.steered.default
            process_dict_updates(
                self.choices,
                batch_update,
                lambda params, *_: requests.choose(params.extra_args, default),
            )
            self.rows = Rows.of(
                [self.choices[i] for i in range(batch_update.batch_size)], self.device
            )
        self.steered.next = self.rows

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return False

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        return logits


def connect(vllm_config: Any, steered: SteeredLogits) -> None:
    """Let the ledger of this engine tell a model about its rows."""
    ledger = _ledgers.get(vllm_config.instance_id)
    if ledger is None:
        raise ValueError("vLLM made no ledger of strengths: logits_processors was changed.")
    ledger.steered = steered
