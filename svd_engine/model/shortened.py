"""A model of few layers out of a large one, to try a runner on."""

import copy
from typing import Any

from torch import nn

SCALARS = (bool, int, float, str, type(None))


def shortened(model: Any) -> Any:
    """Leave out of a model every layer but the first two and one of each further kind."""
    lists = [x for x in model.get_decoder().children() if isinstance(x, nn.ModuleList)]
    layers = max(lists, key=len)
    kept, kinds = list(layers[:2]), {_kind(layer) for layer in layers[:2]}
    for layer in layers[2:]:
        if (kind := _kind(layer)) not in kinds:
            kinds.add(kind)
            kept.append(layer)
    return _with(model, layers, nn.ModuleList(kept))


def _kind(layer: nn.Module) -> str:
    """Describe all of a layer but its weights and its number."""
    parts = []
    for module in layer.modules():
        values = {k: v for k, v in vars(module).items() if _is_plain(v) and k != "layer_idx"}
        weights = [(k, w.dtype, w.shape) for k, w in module.named_parameters(recurse=False)]
        parts.append(f"{type(module)}{sorted(values.items())}{weights}{list(module._modules)}")
    return "".join(parts)


def _is_plain(value: Any) -> bool:
    """Whether a value is a scalar, or a mapping to scalars such as the scales of a LoRA."""
    values = value.values() if isinstance(value, dict) else (value,)
    return all(isinstance(x, SCALARS) for x in values)


def _with(module: nn.Module, old: nn.Module, new: nn.Module) -> Any:
    """Return `module` with `new` in the place of `old`: copies on the way, all else shared."""
    if module is old:
        return new
    for name, child in module._modules.items():
        if child is not None and (changed := _with(child, old, new)) is not child:
            twin = copy.copy(module)
            twin._modules = {**module._modules, name: changed}
            return twin
    return module
