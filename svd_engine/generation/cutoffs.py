"""Cuts that the operators do not make: typical_p, epsilon_cutoff and eta_cutoff."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from svd_engine.generation.sampling_params import SamplingParams


def has_cutoffs(sampling: SamplingParams) -> bool:
    """Whether the distribution is cut by more than the operators cut."""
    cut = sampling.typical_p < 1 or sampling.epsilon_cutoff > 0 or sampling.eta_cutoff > 0
    return cut and sampling.temperature > 0


def cut(sampling: SamplingParams, logits: Tensor) -> Tensor:
    """The logits `[R, V]`, -inf where a cut removes the token, by transformers' order of cuts."""
    chain: list[LogitsProcessor] = [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        chain.append(MinPLogitsWarper(sampling.min_p))
    if sampling.typical_p < 1:
        chain.append(TypicalLogitsWarper(sampling.typical_p))
    if sampling.epsilon_cutoff > 0:
        chain.append(EpsilonLogitsWarper(sampling.epsilon_cutoff))
    if sampling.eta_cutoff > 0:
        chain.append(EtaLogitsWarper(sampling.eta_cutoff, device=str(logits.device)))
    none: Any = None  # they do not look at token ids
    return logits.masked_fill(LogitsProcessorList(chain)(none, logits).isneginf(), -torch.inf)
