"""The two models side by side: what a decoding loop and a scorer need of them, and no more."""

import logging
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor

from svd_engine.model import peft_adapter
from svd_engine.model.runner import ModelRunner

logger = logging.getLogger(__name__)

Prompts = Sequence[Sequence[int]]
PerModel = tuple[Tensor, ...]  # of the adapted and the base model, or of one alone


class Decoder(Protocol):
    """What a decoding loop needs of the models; `PairedRunner` says what each does."""

    @property
    def device(self) -> torch.device: ...
    @property
    def overlaps_host(self) -> bool:
        """Whether a step may run on the device while the host reads tokens."""

    def prefill(self, prompts: Prompts, extra: int = 0, room: int = 0) -> PerModel: ...
    def step(self, tokens: Tensor) -> PerModel: ...
    def reorder(self, index: Tensor) -> None: ...
    def logits(self, hidden: Sequence[Tensor]) -> PerModel: ...


class PairedRunner:
    """One batch [base rows, adapted rows] through the same weights: each is read once a step."""

    overlaps_host = False

    def __init__(self, model: PeftModel) -> None:
        self.stream = ModelRunner(peft_adapter.paired(model), paired=True, **_virtual(model))

    @property
    def device(self) -> torch.device:
        return self.stream.model.device

    @property
    def memory(self) -> Hashable:
        """Differs once tensors that outlive a request have moved."""
        return self.stream.memory

    def prefill(self, prompts: Prompts, extra: int = 0, room: int = 0) -> PerModel:
        """Hidden states of (adapted, base) at each prompt's last token, `[B, H]` each.

        Leaves room for `extra` more tokens a row and, by `reorder`, for `room` rows.
        """
        return _halves(self.stream.prefill([*prompts, *prompts], extra, 2 * room))

    def extend(self, tokens: Tensor, live: int | None = None) -> PerModel:
        """Hidden states of (adapted, base) after more tokens `[B, q]`, `[B, q, H]` each.

        live: a bound on positions, which makes shapes static; see `ModelRunner.extend`.
        """
        return _halves(self.stream.extend(tokens.repeat(2, 1), live))

    def step(self, tokens: Tensor, live: int | None = None) -> PerModel:
        """Logits of (adapted, base) after one more token `[B]`, `[B, V]` each."""
        hidden = self.stream.extend(tokens.repeat(2)[:, None], live)
        return _halves(self.stream.logits(hidden[:, 0]))

    def reorder(self, index: Tensor) -> None:
        """Row i of both models continues from what row index[i] was; int64 `[R]`."""
        self.stream.reorder(torch.cat([index, index + len(self.stream.positions) // 2]))

    def logits(self, hidden: Sequence[Tensor]) -> PerModel:
        """Logits of (adapted, base) from `[N, H]` hidden states of the same."""
        return _halves(self.stream.logits(torch.cat(tuple(hidden)[::-1])))


def _halves(rows: Tensor) -> PerModel:
    base, adapted = rows.chunk(2)
    return adapted, base


class SequentialRunner:
    """One pass a model, each with its own cache: right for every method, and the way to run one
    model alone."""

    overlaps_host = False

    def __init__(self, *streams: ModelRunner) -> None:
        self.streams = streams

    @property
    def device(self) -> torch.device:
        return self.streams[0].model.device

    @property
    def memory(self) -> Hashable:
        return tuple(s.memory for s in self.streams)

    def prefill(self, prompts: Prompts, extra: int = 0, room: int = 0) -> PerModel:
        return tuple(s.prefill(prompts, extra, room) for s in self.streams)

    def extend(self, tokens: Tensor, live: int | None = None) -> PerModel:
        return tuple(s.extend(tokens, live) for s in self.streams)

    def step(self, tokens: Tensor, live: int | None = None) -> PerModel:
        return self.logits([h[:, 0] for h in self.extend(tokens[:, None], live)])

    def reorder(self, index: Tensor) -> None:
        for s in self.streams:
            s.reorder(index)

    def logits(self, hidden: Sequence[Tensor]) -> PerModel:
        return tuple(s.logits(h) for s, h in zip(self.streams, hidden, strict=True))


ModelPair = PairedRunner | SequentialRunner


def adapted_runner(model: PeftModel) -> ModelRunner:
    return ModelRunner(peft_adapter.adapted(model), **_virtual(model))


def base_runner(model: PeftModel) -> ModelRunner:
    return ModelRunner(peft_adapter.base(model))


def _virtual(model: PeftModel) -> dict[str, Any]:
    return dict(
        virtual=peft_adapter.virtual_tokens(model),
        embeddings=peft_adapter.prompt_embeddings(model),
        prefix=peft_adapter.prefix(model),
    )


def pair_models(model: PeftModel, form: str = "auto") -> ModelPair:
    """The pair of models in the form asked for: "auto", "paired" or "sequential"."""
    if form not in ("auto", "paired", "sequential"):
        raise ValueError(f"pairing must be 'auto', 'paired' or 'sequential'; got {form!r}.")
    reason = peft_adapter.why_not_paired(model)
    if reason is None and form != "sequential":
        return PairedRunner(model)
    if form == "paired":
        raise ValueError(f"pairing='paired' is not possible: {reason}. pairing='auto' decodes it.")
    if form == "auto":
        logger.warning("Two forward passes a token, because %s.", reason)
    return SequentialRunner(adapted_runner(model), base_runner(model))
