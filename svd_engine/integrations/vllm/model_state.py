"""The choice of each row of a batch, for Model Runner V2."""

from typing import Any

import torch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from svd_engine.integrations.vllm import requests
from svd_engine.integrations.vllm.steering import STEERED, Rows


class SteeredModelState(DefaultModelState):
    """A strength and a model for each slot; vLLM maps the rows of a step to slots."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        slots = self.max_num_reqs
        self.default = requests.choose(None, model.steered.default)
        self.strength = torch.full((slots,), self.default.strength, device=device)
        self.model_index = torch.full((slots,), self.default.model, device=device)
        self.own: set[int] = set()  # slots that differ from the default

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        extra = None if params is None else params.extra_args
        choice = requests.choose(extra, self.model.steered.default)
        if choice != self.default or req_index in self.own:
            self.strength[req_index] = choice.strength
            self.model_index[req_index] = choice.model
        (self.own.add if choice != self.default else self.own.discard)(req_index)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        slots = input_batch.expanded_idx_mapping
        if self.own or self.default.model != STEERED:
            self.model.steered.next = Rows(self.strength[slots], self.model_index[slots])
        else:
            self.model.steered.next = Rows(self.default.strength)
        return super().prepare_inputs(input_batch, req_states)
