"""The two models of an engine: read, checked for change, and made into runners."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from svd_engine.model import probe
from svd_engine.model.pair import (
    ModelPair,
    SequentialRunner,
    adapted_runner,
    base_runner,
    pair_models,
)
from svd_engine.model.peft_adapter import Adapter

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Models:
    """An adapted model and its base: one PEFT model, two checkpoints, or one model twice."""

    model: Any  # the adapted model, as it was given
    adapted: Adapter
    base: Adapter

    @classmethod
    def of_peft(cls, model: "PeftModel") -> "Models":
        """Read a PEFT model and the base under it. Raise ValueError if it cannot be steered."""
        adapter = Adapter.read(model)
        return cls(model, adapter, adapter)

    @classmethod
    def of_two(cls, adapted: PreTrainedModel, base: PreTrainedModel) -> "Models":
        """Read two models over one vocabulary. Raise ValueError if there are two."""
        sizes = [model.config.get_text_config().vocab_size for model in (adapted, base)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"adapted and base must have one vocabulary; got {sizes[0]} and {sizes[1]} tokens."
            )
        if adapted.device != base.device:
            raise ValueError(
                f"adapted and base must be on one device; got {adapted.device} and {base.device}."
            )
        return cls(adapted, Adapter.none(adapted), Adapter.none(base))

    @classmethod
    def of_one(cls, model: PreTrainedModel) -> "Models":
        """Read one model that is steered by the difference that another prompt makes."""
        adapter = Adapter.none(model)
        return cls(model, adapter, adapter)

    @property
    def is_one(self) -> bool:
        """Whether the models differ in nothing but what they read."""
        return self.adapted is self.base and not self.adapted.name

    @property
    def base_model(self) -> PreTrainedModel:
        return self.base.base_model

    def describe(self, adapter: str) -> str:
        """Say what is paired, for a `repr`; adapter: its folder or name."""
        base = str(self.base_model.name_or_path)
        if self.is_one:
            return f"model={base!r}"
        if self.base is not self.adapted:
            return f"adapted={str(self.model.name_or_path)!r}, base={base!r}"
        method = self.model.peft_config[self.adapted.name].peft_type.value
        return f"base={base!r}, adapter={adapter!r}, method={method!r}"

    def check(self) -> None:
        """Raise ValueError if a model has changed since it was read."""
        self.adapted.state.check()
        if self.base is not self.adapted:
            self.base.state.check()

    def pair(self, pairing: str = "auto") -> ModelPair:
        """Build the runner of both; pairing is "auto", "paired" or "sequential"."""
        if self.base is self.adapted:
            return pair_models(self.adapted, pairing)
        if pairing == "paired":
            raise ValueError(
                "pairing='paired' is not possible: two checkpoints share no weights. "
                "pairing='auto' decodes them."
            )
        return SequentialRunner(adapted_runner(self.adapted), base_runner(self.base))

    def single(self, name: str) -> ModelPair:
        """Build the runner of one of them, "adapted" or "base"."""
        if name == "adapted":
            return SequentialRunner(adapted_runner(self.adapted))
        return SequentialRunner(base_runner(self.base))

    def probe(self, pair: ModelPair) -> None:
        """Raise ValueError unless the runners give what the models give without them."""
        if self.base is self.adapted:
            probe.check(pair, self.adapted, self.model)
            return
        for adapter in (self.adapted, self.base):
            alone = SequentialRunner(adapted_runner(adapter, False), base_runner(adapter, False))
            probe.check(alone, adapter, adapter.base_model)
