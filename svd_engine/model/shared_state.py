"""The state of a PEFT model that runners rely on, and whether it is as it was.

Base weights are shared with the PEFT model, the adapter is copied. Both are watched, because a
changed adapter would be decoded as it was, without a word. A check reads no weights.
"""

import functools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from peft import CPTEmbedding
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

Modules = Sequence[tuple[str, nn.Module]]  # as `named_modules` yields them
UNDER = "base_layer", "original_module"  # where what PEFT puts in a module's place keeps it
PLAIN = Tensor, nn.Parameter  # a quantised weight is a tensor of its own kind
_version, _merged = operator.attrgetter("_version"), operator.attrgetter("merged_adapters")
_disabled = operator.attrgetter("_disable_adapters")


@functools.cache
def _is_put(kind: Any) -> bool:
    return issubclass(kind, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def is_put(module: Any) -> bool:
    """Whether PEFT put the module in the place of another. Faster than `isinstance`."""
    return _is_put(module.__class__)


class Slots:
    """Tensors and modules, and the dictionaries of the modules that hold them, as found."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.owners: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.values: list[Any] = []
        self.counted: dict[str, Tensor] = {}  # those whose every write is a change, by name
        self.plain: dict[str, Tensor] = {}  # those that have an address
        self.versions: list[int] = []
        self.addresses: list[int] = []

    def add(
        self, name: str, owner: dict[str, Any], key: str, value: Any, counted: bool, stays: bool
    ) -> None:
        self.names.append(name)
        self.owners.append(owner)
        self.keys.append(key)
        self.values.append(value)
        if counted:
            self.counted[name] = value
            self.versions.append(value._version)
        if stays and type(value) in PLAIN:
            self.plain[name] = value
            self.addresses.append(value.data_ptr())

    def changed(self) -> str | None:
        """Return the name of one that was replaced, moved or written to, or None."""
        now = list(map(dict.get, self.owners, self.keys))
        versions = list(map(_version, self.counted.values()))
        addresses = list(map(Tensor.data_ptr, self.plain.values()))
        same = all(map(operator.is_, now, self.values))
        if same and versions == self.versions and addresses == self.addresses:
            return None
        pairs = (
            *zip(self.names, map(id, now), map(id, self.values), strict=True),
            *zip(self.counted, versions, self.versions, strict=True),
            *zip(self.plain, addresses, self.addresses, strict=True),
        )
        return next(name for name, now, before in pairs if now != before)


class SharedState:
    """Weights and switches of a PEFT model as an adapter was read from it."""

    def __init__(self, modules: Modules, adapter: str, others: Iterable[str], owner: Any) -> None:
        """Note the state. Raise ValueError if the adapter is merged or disabled.

        modules: all of the model, a parent before its children. adapter: the name of the active
        one, others: the names of the others. owner: the `PeftModel`, if there is one.
        """
        self._adapter, self._owner = adapter, owner
        put: list[tuple[str, Any]] = [x for x in modules if is_put(x[1])]
        self._layers = [layer for _, layer in put]
        self._tuners = [layer for layer in self._layers if isinstance(layer, BaseTunerLayer)]
        self._names = {id(layer): name for name, layer in put}
        self._modules = [id(module) for _, module in modules]
        self._base, self._own = Slots(), Slots()
        self._note(modules, set(others))
        self._active = [list(layer.active_adapters) for layer in self._layers]
        self._scales = self._scales_now()
        self._check_not_merged()
        self._check_enabled()

    @property
    def adapter_tensors(self) -> list[Tensor]:
        return [x for x in self._own.values if isinstance(x, Tensor)]

    @property
    def identity(self) -> tuple[Any, ...]:
        """A value that differs where runners of this state and of another would differ.

        Base weights count, although runners share them: DoRA's norm and merged layers hold them.
        """
        ids = [*self._modules, *map(id, self._base.values), *map(id, self._own.values)]
        addresses = self._base.addresses + self._own.addresses
        versions = self._base.versions + self._own.versions
        return self._adapter, ids, addresses, versions, self._scales

    def check(self) -> None:
        """Raise ValueError if anything has changed."""
        self.check_base()
        self._check_enabled()
        active = [layer.active_adapters for layer in self._layers]
        if self._owner is not None and self._owner.active_adapter != self._adapter:
            self._raise_active("model", self._owner.active_adapter)
        for layer, now, before in zip(self._layers, active, self._active, strict=True):
            if now != before:
                self._raise_active(self._names[id(layer)], now)
        _raise_changed(self._own.changed())
        if (scales := self._scales_now()) != self._scales:
            changed = map(operator.ne, scales, self._scales)
            layer = next(x for x, is_new in zip(self._tuners, changed, strict=True) if is_new)
            _raise_changed(f"the scale of {self._names[id(layer)]}")

    def check_base(self) -> None:
        """Raise ValueError if the base model has changed."""
        self._check_not_merged()
        _raise_changed(self._base.changed())

    def _check_not_merged(self) -> None:
        for layer in filter(_merged, self._tuners):
            raise ValueError(
                f"model has a merged adapter in {self._names[id(layer)]}. Call unmerge_adapter() "
                "first."
            )

    def _check_enabled(self) -> None:
        for layer in filter(_disabled, self._tuners):
            raise ValueError(
                f"model has a disabled adapter in {self._names[id(layer)]}. Call "
                "base_model.enable_adapter_layers() first."
            )

    def _raise_active(self, name: str, now: Any) -> None:
        raise ValueError(
            f"the active adapter of {name} is {now}; it was {self._adapter!r} when the engine was "
            f"made. Call model.set_adapter({self._adapter!r}), or make a new engine."
        )

    def _scales_now(self) -> list[Any]:
        scales = [getattr(layer, "scaling", None) for layer in self._tuners]
        return [x.get(self._adapter) if isinstance(x, dict) else x for x in scales]

    def _note(self, modules: Modules, others: set[str]) -> None:
        """Note the tensors of the base and of the adapter, and the adapter's modules by name."""
        # PEFT sets a parameter that an adapter targets to itself in every pass.
        reset = {id(x.get_param()) for x in self._layers if isinstance(x, ParamWrapper)}
        # It gives these new memory, with the same values.
        moved = {id(x.delta_embedding.weight) for _, x in modules if isinstance(x, CPTEmbedding)}
        found: dict[str, nn.Module | None] = {"": None}
        owned: dict[str, bool] = {"": False}  # by name: whether it belongs to an adapter
        for name, module in modules:
            parent, _, last = name.rpartition(".")
            above, in_own = found.get(parent), owned.get(parent)
            if in_own is None:
                continue  # another adapter's
            under_layer = above is not None and is_put(above)
            in_container = in_own and not under_layer
            if in_container and last in others:
                continue
            own = (
                is_put(module)
                or (in_own and not (under_layer and last in UNDER))
                or (self._owner is not None and name == "prompt_encoder")
            )
            found[name], owned[name] = module, own
            tensors = list(_tensors(module))
            if in_container and above is not None and (tensors or module._modules):
                self._own.add(name, above._modules, last, module, counted=False, stays=True)
            slots = self._own if own else self._base
            for owner, key, tensor in tensors:
                if not (own and key in others):
                    counted = id(tensor) not in reset and not tensor.is_inference()
                    stays = id(tensor) not in moved
                    slots.add(f"{name}.{key}", owner, key, tensor, counted, stays)


def _tensors(module: nn.Module) -> Iterator[tuple[dict, str, Tensor]]:
    """Yield owner, key and value of each parameter and persistent buffer of a module itself."""
    for owner in (module._parameters, module._buffers):
        for key, tensor in owner.items():
            if tensor is not None and key not in module._non_persistent_buffers_set:
                yield owner, key, tensor


def _raise_changed(what: str | None) -> None:
    if what is not None:
        raise ValueError(
            f"{what} has changed since the engine or processor was made; make a new one."
        )
