"""Weights as int8 or int4 codes with scales, in linear layers and in an embedding tied to the head.

They stay codes in memory and in a decode step; activations, and what an adapter adds, are floats.
csrc/cpu/codes.h describes the formats.
"""

from typing import Any

import torch
from torch import Tensor, nn

from svd_engine.ops import cpu

DTYPES = (torch.float32, torch.bfloat16)  # that csrc/cpu computes in
BITS = {"int8": 8, "int4": 4}
BLOCK = {8: 32, 4: 64}  # elements
GROUP = 4  # words of a block with one scale, of int4


def check(weights: str | None, device: str | torch.device) -> None:
    """Raise ValueError for a kind of weights that is not known, or cannot run here."""
    if weights is None:
        return
    if weights not in BITS:
        raise ValueError(f"weights must be {' or '.join(BITS)}; got {weights!r}.")
    if torch.device(device).type != "cpu":
        raise ValueError(f"weights={weights!r} runs on the CPU; the device is {device}.")
    if (reason := cpu.unavailable()) is not None:
        raise ValueError(f"weights={weights!r} needs the native CPU kernels: {reason}.")


def check_steps(model: nn.Module, is_native: bool, how: str) -> None:
    """Raise ValueError for codes where steps go through the modules, which unpack them each time.

    how: how steps run.
    """
    if not is_native and any(isinstance(module, Codes) for module in model.modules()):
        raise ValueError(
            "weights of codes need native decode steps, and with this model and adapter they run "
            f"{how}. Leave weights out."
        )


def quantise(weight: Tensor, bits: int) -> Tensor:
    """Return the codes of a weight `[out, in]`, uint8 `[out, bytes]`.

    int8 has a scale per row, int4 one per 32 elements. A scale takes the largest element to the
    end of the codes.
    """
    out, columns = weight.shape
    block = BLOCK[bits]
    padded = nn.functional.pad(weight.float(), (0, -columns % block))
    if bits == 8:
        scale = padded.abs().amax(1, keepdim=True) / 127
        codes = _rounded(padded, scale).clamp(-127, 127).to(torch.int8)
        return torch.cat([scale.view(torch.uint8), codes.view(torch.uint8)], 1)
    groups = padded.view(out, -1, 8, 2, GROUP)  # element 8 f + l of a block stands in word l
    low, high = groups.amin((2, 4)), groups.amax((2, 4))  # [out, blocks, 2]
    scale = (torch.where(-low > high, low, high) / -8).bfloat16()
    q = _rounded(groups, scale.float()[:, :, None, :, None]).clamp(-8, 7)
    q = q.to(torch.int8).view(torch.uint8).flatten(3).transpose(2, 3) & 15  # [out, blocks, 8, 8]
    codes = q[..., ::2] | q[..., 1::2] << 4
    whole = torch.cat([scale.view(torch.uint8), codes.flatten(2)], 2)
    return whole.flatten(1)


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0, x / scale).round()


class Codes(nn.Module):
    """A weight of codes: what the layers of this module share.

    `weight` is made anew at each access, in the dtype that the layer computes in.
    """

    codes: Tensor  # uint8 [out, bytes]
    like: Tensor  # an empty tensor of the dtype, which moves with the module's

    def _hold(self, codes: Tensor, bits: int, dtype: torch.dtype) -> None:
        self.bits = bits
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def unpacked(self, codes: Tensor, columns: int) -> Tensor:
        """Return rows of codes as numbers."""
        out = torch.empty(len(codes), columns, dtype=self.like.dtype)
        cpu.unpack(codes, self.bits, out)
        return out


class QuantisedLinear(Codes, nn.Linear):
    """`nn.Linear` whose weight is codes."""

    def __init__(self, codes: Tensor, bits: int, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self._hold(codes, bits, plain.weight.dtype)
        self.register_parameter("bias", plain.bias)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        return self.unpacked(self.codes, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class QuantisedEmbedding(Codes, nn.Embedding):
    """`nn.Embedding` whose weight is codes, those of a head."""

    def __init__(self, codes: Tensor, bits: int, plain: nn.Embedding) -> None:
        nn.Module.__init__(self)
        for name in ("num_embeddings", "embedding_dim", "padding_idx"):
            setattr(self, name, getattr(plain, name))
        self._hold(codes, bits, plain.weight.dtype)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        return self.unpacked(self.codes, self.embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.unpacked(self.codes[ids.flatten()], self.embedding_dim)
        return rows.view(*ids.shape, self.embedding_dim)


@torch.no_grad()
def quantise_linears(model: Any, weights: str) -> None:
    """Replace a model's linear layers, and the embedding that its head is tied to.

    weights: "int8" or "int4". Raises ValueError where there is nothing that it may replace.
    """
    bits, head = BITS[weights], model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    if is_tied and type(embedding) is not nn.Embedding:
        raise ValueError(
            f"weights={weights!r}: the head is tied to a {type(embedding).__name__}, which would "
            "lose what it adds to an embedding. Leave weights out."
        )
    found = [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear]
    if not found:
        raise ValueError(
            f"weights={weights!r} quantises nn.Linear layers, and {type(model).__name__} has none."
        )
    for name, module in found:
        if module.weight.dtype not in DTYPES:
            kind = str(module.weight.dtype).removeprefix("torch.")
            raise ValueError(
                f"weights={weights!r} computes in float32 or bfloat16, and the base is {kind}; "
                "give dtype."
            )
        if not module.weight.isfinite().all():
            raise ValueError(f"weights={weights!r}: {name} holds weights that are not finite.")
    for name, module in found:
        layer = QuantisedLinear(quantise(module.weight, bits), bits, module)
        model.set_submodule(name, layer)
        if is_tied and module is head:
            model.set_input_embeddings(QuantisedEmbedding(layer.codes, bits, embedding))
        module._parameters["weight"] = None  # memory falls layer by layer
