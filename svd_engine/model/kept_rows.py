"""What a row of a pair has read, kept beyond its request, and how a request goes on from it."""

from dataclasses import dataclass

from torch import Tensor

Layers = list[tuple[Tensor, Tensor]]  # keys and values of a row, [kv_heads, slots, head_dim] each
PerModel = tuple[Tensor, ...]


@dataclass(frozen=True)
class KeptRow:
    """Keys and values of a text, of each model, and hidden states after its prompt."""

    caches: tuple[Layers, ...]
    hidden: PerModel  # [H] each

    @property
    def bytes(self) -> int:
        return sum(
            x.numel() * x.element_size() for layers in self.caches for kv in layers for x in kv
        )


@dataclass(frozen=True)
class Beginning:
    """The first tokens of a prompt, which a row has read. If all, its hidden states hold too."""

    kept: KeptRow
    tokens: int
