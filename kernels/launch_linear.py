"""Host side of the few-rows linear: joined layers, tiles, programs, and the parts between passes.

The caller has checked the arguments. Nothing is read back from the device, so every call can be
captured in a CUDA graph.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .launch import STREAM_REGISTERS, aligned
from .triton_linear import finish_rows, linear_tiles

JOINED = 3  # layers of one input at most
# Of x per program: more if there are more, of two bytes an element. A row's bits are the same.
ROWS, MANY_ROWS = 16, 32
MANY_ROWS_STAGES, MANY_ROWS_WARPS = 5, 4
# (least outputs, outputs per program, tiles of weights in flight). With few programs each keeps
# more tiles in flight. The number of rows does not enter, so a row's bits do not depend on it.
TILES = ((8192, 32, 5), (4096, 16, 5), (0, 16, 9))
PROGRAMS = 256  # where there are fewer tiles, columns are split among several programs,
COLUMNS = 512  # but hardly into less than so many
SPLITS = 8
IN_BYTES = 256  # of one output's weights, per tile
SUM_TILE = 256

# Whether a kernel starts, and prefetches, while the one before it ends, where the device can.
OVERLAP = True


class Layer(Protocol):
    """A linear layer with its adapter's term, see `Joined`."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def low_rank(self) -> tuple[Tensor, Tensor, Tensor | None] | None: ...
    @property
    def output_scale(self) -> Tensor | None: ...


class Joined(NamedTuple):
    """Up to three linear layers of one input, as the kernels take them.

    The weights `[out, in]` stay where they are; the rest is small and copied.
    """

    weights: tuple[Tensor, ...]
    biases: Tensor  # float32 [2, outputs], of base and of adapted rows
    down: Tensor  # [layers * rank, in] in the weights' dtype
    up: Tensor  # [rank, outputs], the same
    scale: Tensor | None  # float32 [outputs], of adapted rows
    is_plain: bool  # x W^T alone

    @property
    def outputs(self) -> int:
        return self.biases.shape[1]

    @property
    def rank(self) -> int:
        return self.up.shape[0]

    def tile(self) -> tuple[int, int, int]:
        """Outputs per program, tiles in flight, splits."""
        outputs, fan_in = self.outputs, self.weights[0].shape[1]
        tile, stages = next(rest for least, *rest in TILES if outputs >= least)
        splits = min(SPLITS, PROGRAMS // -(-outputs // tile), fan_in // COLUMNS)
        return tile, stages, max(1, splits)

    def finish(self, splits: int) -> dict[str, Any]:
        """What `triton_linear.finished` takes besides tensors."""
        return {
            "SPLITS": splits, "LAYERS": len(self.weights), "RANK": self.rank,
            "SCALED": self.scale is not None,
        }  # fmt: skip

    @property
    def finish_tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.biases, self.up, self.biases if self.scale is None else self.scale


def join(layers: Sequence[Layer]) -> Joined:
    """Join layers of one input. Ranks are padded to the greatest, and that to a multiple of 4."""
    like = layers[0].weight
    sizes = [len(x.weight) for x in layers]
    fan_in, outputs = like.shape[1], sum(sizes)
    ranks = [0 if x.low_rank is None else len(x.low_rank[0]) for x in layers]
    rank = -(-max(ranks) // 4) * 4
    biases = torch.zeros(2, outputs, dtype=torch.float32, device=like.device)
    down, up = like.new_zeros(len(layers), rank, fan_in), like.new_zeros(rank, outputs)
    scale, start = torch.ones_like(biases[0]), 0
    for i, x in enumerate(layers):
        part = slice(start, start := start + sizes[i])
        if x.output_scale is not None:
            scale[part] = x.output_scale
        if x.bias is not None:
            biases[:, part] = x.bias
        biases[1, part] *= scale[part]
        if x.low_rank is not None:
            x_down, x_up, up_bias = x.low_rank
            down[i, : ranks[i]] = x_down
            up[: ranks[i], part] = x_up.T
            if up_bias is not None:
                biases[1, part] += up_bias
    scaled = any(x.output_scale is not None for x in layers)
    return Joined(
        tuple(x.weight for x in layers), biases, down.flatten(0, 1), up, scale if scaled else None,
        not (rank or scaled or any(x.bias is not None for x in layers)),
    )  # fmt: skip


def parts_size(joined: Joined, rows: int) -> int:
    """Return how many float32 elements `multiply` writes."""
    return joined.tile()[2] * rows * (joined.outputs + len(joined.down))


def overlap(x: Tensor) -> dict[str, bool]:
    """The options of a launch: whether it overlaps the end of the kernel before.

    Each kernel waits, so mixing kernels that overlap with others is right as well.
    """
    overlaps = OVERLAP and can_overlap(x.device)
    return {"OVERLAP": True, "launch_pdl": True} if overlaps else {"OVERLAP": False}


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Tell whether a device has programmatic dependent launch."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def multiply(x: Tensor, joined: Joined, parts: Tensor, splits: int | None = None) -> int:
    """Write the parts of x [weights, down]^T and return the number of splits.

    x: `[M, in]`. parts: contiguous `[splits, M, outputs + ranks]`, or a matrix `[M, outputs]` of
    any row stride for a plain layer in one split.
    """
    (rows, fan_in), weights, down = x.shape, joined.weights, joined.down
    out_tile, stages, planned = joined.tile()
    splits = planned if splits is None else splits
    unread = weights[0]
    each = [(w, w.stride(0), len(w)) for w in weights]
    each += [(unread, 0, 0)] * (JOINED - len(each))
    ranks = len(down)
    wide = aligned(x, *weights, down if ranks else unread)
    sizes = *(len(w) for w in weights), ranks
    tiles = sum(-(-size // out_tile) for size in sizes)
    block = ROWS if rows <= ROWS or x.itemsize > 2 else MANY_ROWS
    warps = out_tile // 8
    if block > ROWS:
        stages, warps = min(stages, MANY_ROWS_STAGES), MANY_ROWS_WARPS
    stride = parts.stride(-2) if parts.dim() > 1 else joined.outputs + ranks
    if tiles * rows == 0:
        return splits
    with torch.cuda.device_of(x):  # Triton launches on the current device
        linear_tiles[(tiles * splits * -(-rows // block),)](
            x, x.stride(0), *each[0], *each[1], *each[2], down if ranks else unread,
            down.stride(0) if ranks else 0, ranks, parts, stride, rows, fan_in, splits,
            ALIGNED=wide, ROWS=block, OUT_TILE=out_tile, IN_TILE=IN_BYTES // x.itemsize,
            STAGES=stages if wide else 1, num_warps=warps, enable_fp_fusion=True, **overlap(x),
            # Bounded only where it has to be: given room, ptxas takes it, and spills besides.
            maxnreg=STREAM_REGISTERS if block == ROWS or not wide else None,
        )  # fmt: skip
    return splits


def linear(x: Tensor, joined: Joined, first: int, out: Tensor) -> None:
    """out = reference.linear(x, weight, ...) of one layer, rounded once.

    x `[M, in]` and out `[M, out]` have the weight's dtype: float32, bfloat16 or float16. Rows from
    `first` on are adapted. Matrices have last stride 1.
    """
    rows, outputs = out.shape
    if rows * outputs == 0:
        return
    if joined.is_plain and joined.tile()[2] == 1:
        multiply(x, joined, out)
        return
    parts = torch.empty(parts_size(joined, rows), dtype=torch.float32, device=x.device)
    splits = multiply(x, joined, parts)
    with torch.cuda.device_of(x):
        finish_rows[(rows * -(-outputs // SUM_TILE),)](
            parts, rows, outputs, first, *joined.finish_tensors, out, out.stride(0),
            **joined.finish(splits), TILE=SUM_TILE, num_warps=4, maxnreg=STREAM_REGISTERS,
            enable_fp_fusion=True, **overlap(x),
        )  # fmt: skip
