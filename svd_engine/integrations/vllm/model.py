"""`Steered<Architecture>`: vLLM's own class on 2N rows, [base; adapted], and one set of weights."""

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.sequence import IntermediateTensors

from svd_engine.integrations.vllm import arguments, attention, layers, ledger, plugin
from svd_engine.integrations.vllm.steering import SteeredLogits
from svd_engine.integrations.vllm.terms import AdapterTerms


def _side_by_side(rows: Tensor) -> Tensor:
    """Return `[2N, H]`, the base's rows first, as `[N, 2H]`, which vLLM may cut by tokens."""
    return torch.cat(rows.chunk(2), -1)


def _one_below_the_other(rows: Tensor) -> Tensor:
    return torch.cat(rows.chunk(2, -1))


def _map(change: Callable[[Tensor], Tensor], tensors: IntermediateTensors) -> IntermediateTensors:
    """Change each tensor that a stage of a pipeline hands to the next."""
    return IntermediateTensors({name: change(x) for name, x in tensors.items()})


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": 0, "positions": -1, "intermediate_tensors": 0, "inputs_embeds": 0,
    }
)  # fmt: skip
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
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        if intermediate_tensors is None:  # the first stage of a pipeline
            if inputs_embeds is None:
                inputs_embeds = self.model.embed_input_ids(input_ids)
            adapted = inputs_embeds
            if self.embedding is not None:
                adapted = self.embedding(input_ids, inputs_embeds)
            inputs_embeds = torch.cat((inputs_embeds, adapted))
        else:
            intermediate_tensors = _map(_one_below_the_other, intermediate_tensors)
        positions = torch.cat((positions, positions), -1)
        out = self.model(None, positions, intermediate_tensors, inputs_embeds)
        if isinstance(out, IntermediateTensors):
            return _map(_side_by_side, out)
        return _side_by_side(out)


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
        empty = self.make_empty_intermediate_tensors  # type: ignore[has-type]
        self.make_empty_intermediate_tensors = lambda *args, **kwargs: _map(
            lambda x: torch.cat((x, x), -1), empty(*args, **kwargs)
        )
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
        return self.doubled(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        rows = self.steered.take()
        both = _one_below_the_other(hidden_states)
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
