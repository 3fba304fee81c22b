"""Makes a tree of modules one in float32, in which wrong numbers do not hide behind rounding."""

from typing import Any

from torch import Tensor, nn

from svd_engine.model.adapter_layers import AdaptedLayer, Halves

VOCABULARY = 64  # tokens that are left: a trial reads no others


def widen(model: Any) -> None:
    """Widen a model whose modules share parameters with another, which stays as it is.

    The head becomes a plain one of few tokens, and embeddings are the base's for both halves if
    each has its own.
    """
    head: Any = _base(model.get_output_embeddings())
    embedding: Any = _base(model.get_input_embeddings())
    if isinstance(model.get_input_embeddings(), Halves):
        model.set_input_embeddings(embedding)
    few = nn.Linear(head.in_features, VOCABULARY, bias=False, device="meta")
    few._parameters["weight"] = _parameter(head.weight[:VOCABULARY])
    model.set_output_embeddings(few)
    embedding._parameters["weight"] = _parameter(embedding.weight[:VOCABULARY])
    for module in model.modules():
        parameters, buffers = module._parameters.items(), module._buffers.items()
        module._parameters = {k: x if x is None else _parameter(x) for k, x in parameters}
        module._buffers = {k: _wide(x) for k, x in buffers}
        if isinstance(module, AdaptedLayer):
            for k, x in list(vars(module).items()):
                vars(module)[k] = tuple(map(_wide, x)) if isinstance(x, tuple) else _wide(x)


def _base(module: nn.Module) -> nn.Module:
    if isinstance(module, Halves):
        return module.base
    return module.base_layer if isinstance(module, AdaptedLayer) else module


def _parameter(x: Tensor) -> nn.Parameter:
    return nn.Parameter(_wide(x.detach()), requires_grad=False)


def _wide(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
