"""The state of a PEFT model that runners rely on, and whether it is as it was.

Base weights are shared with the PEFT model, the adapter is copied. Both are watched, because a
changed adapter would be decoded as it was, without a word.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

Modules = Sequence[tuple[str, nn.Module]]  # as `named_modules` yields them
KINDS = BaseTunerLayer, AuxiliaryTrainingWrapper  # what PEFT puts in the place of a module
UNDER = "base_layer", "original_module"  # where these keep the module
PLAIN = Tensor, nn.Parameter  # a quantised weight is a tensor of its own kind
NEW_ENGINE = "make a new engine."


class Watched(NamedTuple):
    """A tensor or module as it was found in its owner."""

    name: str
    owner: dict[str, Any]  # `_parameters`, `_buffers` or `_modules` of a module
    key: str
    value: Any
    stamp: tuple[int, int] = (0, 0)  # of a tensor
    is_counted: bool = True  # whether every write to the tensor is a change


class SharedState:
    """Weights and switches of a PEFT model as an adapter was read from it."""

    def __init__(self, modules: Modules, adapter: str, others: Iterable[str], owner: Any) -> None:
        """Note the state.

        modules: all of the model, a parent before its children. adapter: the name of the active
        one, others: the names of the others. owner: what has `active_adapter`, a `PeftModel`.
        """
        self._adapter, self._owner = adapter, owner
        self._base: list[Watched] = []
        self._own: list[Watched] = []
        self._layers: list[tuple[str, Any]] = [x for x in modules if isinstance(x[1], KINDS)]
        self._note(modules, set(others))
        self._tuners = [(name, x) for name, x in self._layers if isinstance(x, BaseTunerLayer)]
        self._active = [list(x.active_adapters) for _, x in self._layers]
        self._scales = [self._scale(x) for _, x in self._tuners]
        self._check_switches()

    @property
    def adapter_tensors(self) -> list[Tensor]:
        return [x.value for x in self._own if isinstance(x.value, Tensor)]

    @property
    def base_tensors(self) -> list[Tensor]:
        return [x.value for x in self._base]

    def check(self) -> None:
        """Raise ValueError if anything has changed."""
        self.check_base()
        if self._owner is not None and self._owner.active_adapter != self._adapter:
            self._raise_active("model", self._owner.active_adapter)
        for (name, layer), before in zip(self._layers, self._active, strict=True):
            if layer.active_adapters != before:
                self._raise_active(name, layer.active_adapters)
        _check_unchanged(self._own)
        for (name, layer), scale in zip(self._tuners, self._scales, strict=True):
            if self._scale(layer) != scale:
                raise ValueError(
                    f"the scale of {name} has changed since the engine was made; {NEW_ENGINE}"
                )

    def check_base(self) -> None:
        """Raise ValueError if the base model has changed, or the adapter is switched or merged."""
        self._check_switches()
        _check_unchanged(self._base)

    def _check_switches(self) -> None:
        """Raise ValueError if a layer holds a merged or disabled adapter."""
        for name, layer in self._tuners:
            if layer.merged_adapters:
                raise ValueError(
                    f"model has a merged adapter in {name}. Call unmerge_adapter() first."
                )
            if layer._disable_adapters:
                raise ValueError(
                    f"model has a disabled adapter in {name}. Call "
                    "base_model.enable_adapter_layers() first."
                )

    def _raise_active(self, name: str, now: Any) -> None:
        raise ValueError(
            f"the active adapter of {name} is {now}; it was {self._adapter!r} when the engine was "
            f"made. Call model.set_adapter({self._adapter!r}), or {NEW_ENGINE}"
        )

    def _scale(self, layer: BaseTunerLayer) -> Any:
        scales = getattr(layer, "scaling", None)
        return scales.get(self._adapter) if isinstance(scales, dict) else scales

    def _note(self, modules: Modules, others: set[str]) -> None:
        """Note the tensors of the base and of the adapter, and the adapter's modules by name."""
        # PEFT sets a parameter that an adapter targets to itself in every pass.
        reset = {id(x.get_param()) for _, x in self._layers if isinstance(x, ParamWrapper)}
        found: dict[str, nn.Module] = {}
        owned: dict[str, bool] = {}  # by name: whether it belongs to an adapter
        for name, module in modules:
            parent, _, last = name.rpartition(".")
            above = found.get(parent)
            in_container = owned.get(parent, False) and not isinstance(above, KINDS)
            if (in_container and last in others) or (parent and parent not in found):
                continue  # another adapter's
            found[name] = module
            owned[name] = (
                isinstance(module, KINDS)
                or (self._owner is not None and name == "prompt_encoder")
                or (owned.get(parent, False) and not (isinstance(above, KINDS) and last in UNDER))
            )
            if in_container and last == self._adapter and above is not None:
                self._own.append(Watched(name, above._modules, last, module))
            watched = self._own if owned[name] else self._base
            for owner, key, tensor in _tensors(module):
                if not (owned[name] and key in others):
                    counted = id(tensor) not in reset and not tensor.is_inference()
                    stamp = _stamp(tensor, counted)
                    watched.append(Watched(f"{name}.{key}", owner, key, tensor, stamp, counted))


def _tensors(module: nn.Module) -> Iterator[tuple[dict, str, Tensor]]:
    """Yield owner, key and value of each parameter and persistent buffer of a module itself."""
    for owner in (module._parameters, module._buffers):
        for key, tensor in owner.items():
            if tensor is not None and key not in module._non_persistent_buffers_set:
                yield owner, key, tensor


def _stamp(tensor: Tensor, counted: bool) -> tuple[int, int]:
    """Return numbers that change when the tensor is written to, if counted, or moved."""
    version = tensor._version if counted else 0
    return version, tensor.data_ptr() if type(tensor) in PLAIN else 0


def _check_unchanged(watched: list[Watched]) -> None:
    for name, owner, key, value, stamp, counted in watched:
        if owner.get(key) is not value or (
            isinstance(value, Tensor) and _stamp(value, counted) != stamp
        ):
            raise ValueError(f"{name} has changed since the engine was made; {NEW_ENGINE}")
