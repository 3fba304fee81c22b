"""A second tree of modules over the same parameters, so that the first stays as it was found.

Plain linear layers become those of `layers.linear`; on the CPU, what is recognised between them
becomes native (`layers.rms_norm`, `layers.rotary`).
"""

import copy
from collections import OrderedDict
from collections.abc import Callable

from torch import nn
from transformers import PretrainedConfig

from svd_engine.model.layers import linear, rms_norm, rotary

Replace = Callable[[nn.Module], nn.Module | None]


def clone_sharing_parameters(root: nn.Module, replace: Replace) -> nn.Module:
    """A tree like `root`, in evaluation mode, with what `replace` returns in place of a module."""
    configs: dict[int, PretrainedConfig] = {}
    twins: dict[int, nn.Module] = {}  # by the module found in the tree, which stays alive

    def visit(found: nn.Module) -> nn.Module:
        if id(found) in twins:
            return twins[id(found)]
        module = replace(found) or found
        twin = twins[id(found)] = copy.copy(module)
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            setattr(twin, hooks, OrderedDict(getattr(module, hooks)))
        if type(twin) is nn.Linear:
            twin.__class__ = linear.Linear
        rms_norm.use_native_forward(twin)
        rotary.use_native_forward(twin)
        twin._modules = {
            name: None if child is None else visit(child) for name, child in module._modules.items()
        }
        if isinstance(config := getattr(module, "config", None), PretrainedConfig):
            twin.config = configs.setdefault(id(config), copy.deepcopy(config))  # type: ignore
        return twin

    return visit(root).eval()
