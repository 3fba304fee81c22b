"""Second trees of modules over a PEFT model's parameters; the PEFT model itself is not changed.

Plain linear layers become those of `layers.linear`, and attention is that of `layers.attention`.
"""

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from svd_engine.model.adapter_layers import for_second_half
from svd_engine.model.layers import attention, feed_forward, linear, longrope
from svd_engine.model.peft_adapter import Adapter

Replacements = Mapping[Any, nn.Module]  # by the module to be replaced


def paired_tree(adapter: Adapter) -> PreTrainedModel:
    """Build the tree that runs [base_1..base_B, adapted_1..adapted_B] through each weight once.

    Only for an adapter without a `reason_not_paired`.
    """
    bases = adapter.originals
    return _tree(adapter, {x: for_second_half(bases[x], y) for x, y in adapter.copies.items()})


def adapted_tree(adapter: Adapter) -> PreTrainedModel:
    """Build the adapted model's tree, without the virtual tokens of the prompt methods."""
    return _tree(adapter, adapter.copies)


def base_tree(adapter: Adapter) -> PreTrainedModel:
    """Build the tree of the pre-trained model under the adapter."""
    return _tree(adapter, adapter.originals)


def plain_trees(
    model: nn.Module, adapter: Adapter, replacements: Replacements
) -> tuple[nn.Module, nn.Module]:
    """Build the adapted and the base model as PEFT and transformers compute them.

    model: the PEFT model that the adapter was read from, taken with the replacements. Attention is
    eager, the one that defines an architecture; nothing is replaced by layers of ours.
    """
    adapted = clone_sharing_parameters(model, replacements, native=False)
    base = clone_sharing_parameters(adapter.base_model, adapter.originals, native=False)
    for tree in (adapted, base):
        for module in tree.modules():
            if isinstance(module, PreTrainedModel):
                module.set_attn_implementation("eager")
                break
    return adapted, base


def _tree(adapter: Adapter, replacements: Replacements) -> PreTrainedModel:
    tree = clone_sharing_parameters(adapter.base_model, replacements)
    assert isinstance(tree, PreTrainedModel)
    tree.set_attn_implementation(attention.NAME)
    return tree


def clone_sharing_parameters(
    root: nn.Module, replacements: Replacements, native: bool = True
) -> nn.Module:
    """Build a tree like `root`, in evaluation mode, with the replacements in it.

    native: also replace the layers that have a form of ours.
    """
    configs: dict[int, PretrainedConfig] = {}
    # By id of the module in `root`, which keeps it alive, and whether it is what a layer puts its
    # parametrisation on in each pass.
    clones: dict[tuple[int, bool], nn.Module] = {}

    def visit(found: nn.Module, above: nn.Module | None = None) -> nn.Module:
        key = id(found), isinstance(above, ParamWrapper)
        if key in clones:
            return clones[key]
        module = replacements.get(found, found)
        clone = clones[key] = copy.copy(module)
        clone._parameters = dict(module._parameters)
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            setattr(clone, hooks, OrderedDict(getattr(module, hooks)))
        if native:
            if type(clone) is nn.Linear and not key[1]:
                clone.__class__ = linear.Linear
            longrope.choose_per_row(clone)
            feed_forward.multiply_in_pieces(clone)
        clone._modules = {
            name: None if child is None else visit(child, module)
            for name, child in module._modules.items()
        }
        if isinstance(config := getattr(module, "config", None), PretrainedConfig):
            clone.config = configs.setdefault(id(config), copy.deepcopy(config))  # type: ignore
        return clone

    return visit(root).eval()
