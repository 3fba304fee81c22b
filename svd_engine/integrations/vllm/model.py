"""`Steered<Architecture>`: vLLM's own class on 2N rows, [base; adapted], and one set of weights."""

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile

from svd_engine.integrations.vllm import arguments, attention, layers, ledger, plugin
from svd_engine.integrations.vllm.steering import SteeredLogits
from svd_engine.integrations.vllm.terms import AdapterTerms


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "inputs_embeds": 0})
class Doubled(nn.Module):
    """N rows in, and `[N, 2H]` out: the inner model's rows of both models, side by side.

    vLLM compiles and records this one, so that its own buffers stay the inputs.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "", model: Any) -> None:
        super().__init__()
        self.model = model
        self.embedding: Any = None  # the adapter's change to embeddings

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_input_ids(input_ids)
        adapted = inputs_embeds
        if self.embedding is not None:
            adapted = self.embedding(input_ids, inputs_embeds)
        inputs_embeds = torch.cat((inputs_embeds, adapted))
        positions = torch.cat((positions, positions), -1)
        out = self.model(None, positions, None, inputs_embeds)
        return torch.cat(out.chunk(2), -1)


class Steered:
    """Mixed in before a vLLM class of causal language models."""

    doubled: Doubled
    supports_lora = False  # vLLM's LoRA would index N tokens, not 2N rows

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
        config = vllm_config.model_config
        values = getattr(config.hf_config, arguments.KEY)
        terms = AdapterTerms(config.hf_config, values["adapter"])
        if terms.needs_weights and vllm_config.quant_config is not None:
            raise ValueError(
                "DoRA on a quantised base is not supported in vLLM: use SteeredEngine."
            )
        ends = vllm_config.compilation_config.compile_ranges_endpoints
        if ends:
            ends.append(2 * max(ends))  # pieces of the compiled model see 2N rows
        with attention.paired():
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore
        attention.check(vllm_config.compilation_config.static_forward_context)
        self.terms: AdapterTerms | None = terms
        self.model_config = config
        doubled = Doubled(vllm_config=vllm_config, prefix=prefix, model=self.model)  # type: ignore
        self.__dict__["doubled"] = doubled  # no submodule: parameters keep their names
        self.steered = SteeredLogits(arguments.steering_of(values, Path(values["adapter"])))
        if not vllm_config.use_v2_model_runner:
            ledger.connect(vllm_config, self.steered)

    def forward(
        self, input_ids: Any, positions: Any, intermediate_tensors: Any = None,
        inputs_embeds: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        return self.doubled(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        rows = self.steered.take()
        both = torch.cat(hidden_states.chunk(2, -1))
        logits = super().compute_logits(both, *args, **kwargs)  # type: ignore[misc]
        if logits is None:  # another rank gathers
            return None
        base, adapted = logits.chunk(2)
        return self.steered.combine(adapted, base, rows)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        terms, self.terms = self.terms, None
        if terms is None:
            raise ValueError("the weights of a steered model are loaded once; make a new engine.")
        loaded = super().load_weights(terms.watch(weights))  # type: ignore[misc]
        layers.attach(self, terms.found, self.model_config)
        return loaded

    @staticmethod
    def get_model_state_cls() -> type:
        """Asked for by Model Runner V2."""
        from svd_engine.integrations.vllm.model_state import SteeredModelState

        return SteeredModelState


def __getattr__(name: str) -> type:
    """Make the class of an architecture when vLLM asks for it."""
    architecture = name.removeprefix(plugin.PREFIX)
    if architecture == name or architecture not in plugin.ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"vllm.model_executor.models.{plugin.ARCHITECTURES[architecture]}")
    made = type(name, (Steered, getattr(module, architecture)), {"__module__": __name__})
    globals()[name] = made
    return made
