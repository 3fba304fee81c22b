"""A base model that is read only where the choice of a token depends on it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from svd_engine.kernels.reference import log_alpha
from svd_engine.model.pair import Decoder, ModelPair, PerModel, Prompts, SequentialRunner
from svd_engine.model.step.cpu import CpuStep

MOST = 4  # tokens that wait: more cost what one pass saves


class LazyBase:
    """A `Decoder` of two runners. While every row's support is one token, the base waits.

    That token is certain, whatever the base says. The tokens that the base has not read it reads in
    one pass before the next choice that needs it. Until then the adapted logits stand in for its
    own, from which the operators draw the same token with the same log-probability.
    """

    overlaps_host = False

    def __init__(self, pair: SequentialRunner, log_alpha: float) -> None:
        self._pair, self._log_alpha = pair, log_alpha
        self._adapted, self._base = pair.runners
        self._waiting = torch.empty(0, 0, dtype=torch.int64)  # [rows, tokens]
        self.base_passes = self.steps = 0

    @property
    def device(self) -> torch.device:
        return self._pair.device

    def prefill(
        self,
        prompts: Prompts,
        max_new_tokens: int = 0,
        max_rows: int = 0,
        contrast: Prompts | None = None,
    ) -> PerModel:
        """Call the pair's."""
        self._waiting = torch.empty(len(prompts), 0, dtype=torch.int64, device=self.device)
        return self._pair.prefill(prompts, max_new_tokens, max_rows, contrast)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> PerModel:
        """Return logits of both after one more token per row, the adapted ones twice if certain."""
        adapted = self._adapted.step(tokens)
        self._waiting = torch.cat([self._waiting, tokens[:, None]], 1)
        self.steps += 1
        if self._waiting.shape[1] < MOST and self._are_certain(adapted):
            return adapted, adapted
        waiting, self._waiting = self._waiting, self._waiting[:, :0]
        self.base_passes += 1
        if waiting.shape[1] == 1:
            return adapted, self._base.step(tokens)
        return adapted, self._base.logits(self._base.extend(waiting)[:, -1])

    def _are_certain(self, logits: Tensor) -> bool:
        """Whether the support of each row is one token, by the comparison of the operators."""
        logits = logits.float()
        threshold = logits.amax(-1, keepdim=True) + self._log_alpha
        return bool(((logits >= threshold).sum(-1) == 1).all())

    def reorder(self, index: Tensor) -> None:
        """Call the pair's; the tokens that wait move along."""
        self._waiting = self._waiting[index]
        self._pair.reorder(index)

    def logits(self, hidden: Sequence[Tensor]) -> PerModel:
        """Call the pair's."""
        return self._pair.logits(hidden)


def decoder(pair: ModelPair, otherwise: Decoder, alpha: float, penalty: float) -> Decoder:
    """Return what lets the base of a pair wait; `otherwise` where that could change a token.

    Native steps on a CPU have the same bits for one new token and several; others may round.
    """
    if not isinstance(pair, SequentialRunner) or alpha == 0 or penalty > -math.inf:
        return otherwise
    exact = isinstance(pair.runners[-1].native, CpuStep)
    return LazyBase(pair, log_alpha(alpha)) if exact else otherwise
