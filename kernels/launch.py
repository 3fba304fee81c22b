"""Host side of the Triton backend: which kernels run, with how much memory and which tiles.

`svd_engine.ops` has checked the arguments. Nothing is read back from the device, so every call can
be captured in a CUDA graph.
"""

import functools
import itertools
import math
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .arguments import Draw, Mask, PerRow, log_alpha
from .triton_cut import cut_rows
from .triton_measure import ENTRIES, ROW, STATISTICS, combine_rows, measure_tiles
from .triton_sample import choose_tiles, sample_rows, settle_rows
from .triton_score import project_rows, score_rows
from .triton_steer import steer_tiles
from .triton_support import divergence_rows, support_rows
from .triton_topk import topk_rows

# Tokens of a row per program. The batch does not change it, so a row's bits do not depend on its
# batch.
TILE = 2048
STREAM_WARPS = 4  # of a program that streams one tile
ROW_WARPS = 8  # of a program that walks a row's tiles one after the other
# At most so many registers per thread: without a bound ptxas chooses a lower one and spills.
STREAM_REGISTERS, ROW_REGISTERS = 128, 168
MEASURE_REGISTERS = 80  # so that 6 programs of the first pass fit a multiprocessor at once

# From so many rows on, a launch that combines each row's tiles costs less than doing so in every
# program of the second pass.
MANY_ROWS = 64

UNSTEERED = Mask((0.0, None), alpha=0.0, penalty=0.0)
GREEDY = Draw(0.0, top_k=0, top_p=1.0, min_p=0.0, seed=(0, None), position=(0, None))
DIFFERENCE = "difference"


def unavailable() -> str | None:
    """Return why Triton cannot run here, or None. Without Triton this module does not import."""
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
        return None
    return "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"


def takes(device: str) -> bool:
    """Tell whether the kernels compute on tensors on this type of device."""
    return device == ("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


def workspace_size(rows: int, vocab: int) -> int:
    """Return how many float32 elements a call on `[rows, vocab]` needs as `workspace`."""
    numbers = (STATISTICS.value + 1) * _tiles(vocab)
    return rows * (numbers + ROW.value + ENTRIES.value)


# For every operator: adapted, base: `[N, V]`, each float32, bfloat16 or float16, last stride 1.
# `PerRow` tensors are float32 for the strength, int64 for seed and position. target: int64 `[N]`.
# Results are contiguous float32, except tokens (int64) and in_support (bool); `[N, V]` results may
# have any row stride, and those of `steer` any of the three dtypes.
# workspace: float32 `[workspace_size(N, V)]` or more.


def steer(
    adapted: Tensor, base: Tensor, mask: Mask, out: Tensor, *, workspace: Tensor | None = None
) -> None:
    """out = reference.steer(adapted, base, strength)."""
    rows = _Rows(adapted, base, workspace)
    rows.each_tile(
        steer_tiles, *rows.steering(mask), out, out.stride(0),
        REMOVE=mask.removes, DELTA=False, ALIGNED=rows.aligned and aligned(out),
    )  # fmt: skip


def steering_vector(
    adapted: Tensor, base: Tensor, direction: str, out: Tensor, *, workspace: Tensor | None = None
) -> None:
    """out = reference.steering_vector(adapted, base, direction)."""
    rows = _Rows(adapted, base, workspace)
    rows.each_tile(
        steer_tiles, *rows.steering(UNSTEERED._replace(direction=direction)), out, out.stride(0),
        REMOVE=True, DELTA=True, ALIGNED=rows.aligned and aligned(out),
    )  # fmt: skip


def sample(
    adapted: Tensor,
    base: Tensor,
    mask: Mask,
    draw: Draw,
    token: Tensor,
    logprob: Tensor,
    *,
    workspace: Tensor | None = None,
) -> None:
    """token, logprob = reference.sample(adapted, base, ...).

    If a token may come from any tile, every tile gets a program and a third launch settles the row.
    Otherwise, and for cuts, one program per row reads what it needs.
    """
    every_tile = mask.alpha == 0 or not mask.removes
    marked = mask.removes if draw.is_cut else not every_tile
    rows = _Rows(adapted, base, workspace, marks=mask.alpha if marked else None)
    steering, noise = rows.steering(mask), _noise(draw, token)
    greedy = draw.temperature == 0
    if draw.is_cut:
        top_k, top_p, log_min_p = draw.cuts
        cuts = min(top_k, rows.vocab), top_p, log_min_p
        rows.each_row(
            cut_rows, *steering, *noise, *cuts, token, logprob,
            REMOVE=mask.removes, CHUNK=rows.chunk,
        )  # fmt: skip
    elif every_tile:
        rows.each_tile(choose_tiles, *steering, *noise, REMOVE=mask.removes, GREEDY=greedy)
        rows.settle(settle_rows, token, logprob)
    else:
        rows.each_row(
            sample_rows, *steering, *noise, token, logprob, GREEDY=greedy, CHUNK=rows.chunk
        )


def topk(
    adapted: Tensor,
    base: Tensor,
    mask: Mask,
    k: int,
    logprob: Tensor,
    token: Tensor,
    *,
    workspace: Tensor | None = None,
) -> None:
    """logprob, token `[N, k]` = reference.topk(adapted, base, strength, k)."""
    rows = _Rows(adapted, base, workspace, marks=mask.alpha if mask.removes else None)
    rows.each_row(
        topk_rows, *rows.steering(mask), k, logprob, token, REMOVE=mask.removes, CHUNK=rows.chunk
    )


def score(
    adapted: Tensor,
    base: Tensor,
    mask: Mask,
    target: Tensor,
    logprob: Tensor,
    *,
    workspace: Tensor | None = None,
) -> None:
    """logprob = reference.score(adapted, base, strength, target)."""
    chosen = mask.alpha == 0
    marks = mask.alpha if mask.removes and not chosen else None
    rows = _Rows(adapted, base, workspace, marks=marks)
    steering = rows.steering(mask)
    if chosen:
        noise = _noise(GREEDY, target)
        rows.each_tile(choose_tiles, *steering, *noise, REMOVE=mask.removes, GREEDY=True)
    rows.each_row(
        score_rows, *steering, target.contiguous(), logprob,
        REMOVE=mask.removes, CHOSEN=chosen, CHUNK=rows.chunk,
    )  # fmt: skip


def project_strength(
    adapted: Tensor,
    base: Tensor,
    target: Tensor,
    alpha: float,
    direction: str,
    numerator: Tensor,
    gauss_newton: Tensor,
    newton: Tensor,
    in_support: Tensor,
    *,
    workspace: Tensor | None = None,
) -> None:
    """numerator, gauss_newton, newton, in_support = reference.project_strength(...)."""
    outputs = numerator, gauss_newton, newton, in_support
    rows = _Rows(adapted, base, workspace, marks=alpha)
    own = log_alpha(alpha), int(direction == DIFFERENCE), target.contiguous()
    rows.each_row(project_rows, *own, *outputs, CHUNK=rows.chunk)


def support(
    adapted: Tensor,
    base: Tensor,
    target: Tensor,
    alpha: float,
    direction: str,
    capacity: int,
    *outputs: Tensor,
    workspace: Tensor | None = None,
) -> None:
    """The eight fields of reference.support(adapted, base, target, capacity, ...)."""
    rows = _Rows(adapted, base, workspace, BASE=True, marks=alpha)
    own = log_alpha(alpha), int(direction == DIFFERENCE), target.contiguous(), capacity
    rows.each_row(support_rows, *own, *outputs, CHUNK=rows.chunk)


def divergence(
    adapted: Tensor, base: Tensor, out: Tensor, *, workspace: Tensor | None = None
) -> None:
    """out = reference.divergence(adapted, base)."""
    _Rows(adapted, base, workspace, BASE=True).settle(divergence_rows, out)


def warmup(vocab: int, dtypes: Iterable[torch.dtype], device: torch.device | str = "cuda") -> None:
    """Compile every kernel that requests with this vocabulary and any mix of these dtypes can need.

    The mix includes `out` of `steer`; `steering_vector` writes float32. Every operator runs on one
    row per compiled form; later no batch size compiles anything.
    """
    token = torch.zeros(1, dtype=torch.int64, device=device)
    number = torch.zeros(1, device=device)
    several = number, number, number, torch.zeros(1, dtype=torch.bool, device=device)
    listed = (number,) * 5
    width = -(-vocab // 8) * 8 + 8
    buffers = [torch.zeros(1, width, dtype=x, device=device) for x in dtypes]
    delta = torch.empty(1, width, device=device)
    # One token past an aligned address is unaligned, and so are rows if V is no multiple of 8.
    layouts = (0, 1) if vocab % 8 == 0 else (1,)
    masks = [
        Mask((1.0, None), alpha, penalty) for alpha in (0.0, 0.1) for penalty in (-math.inf, -1.0)
    ]
    draws = [GREEDY, GREEDY._replace(temperature=1.0), GREEDY._replace(temperature=1.0, top_k=1)]
    for lead, z, b in itertools.product(layouts, buffers, buffers):
        z, b = z[:, lead : lead + vocab], b[:, lead : lead + vocab]
        divergence(z, b, number)
        _Rows(z, b, None).combine()
        project_strength(z, b, token, 0.1, DIFFERENCE, *several)
        support(z, b, token, 0.1, DIFFERENCE, 1, token, number, *listed, token)
        for mask in masks:
            topk(z, b, mask, 1, number, token)
            score(z, b, mask, token, number)
            for draw in draws:
                sample(z, b, mask, draw, token, number)
        for out_lead in layouts:
            steering_vector(z, b, DIFFERENCE, delta[:, out_lead : out_lead + vocab])
            for mask, out in itertools.product(masks, buffers):
                out = torch.empty_like(out)[:, out_lead : out_lead + vocab]
                steer(z, b, mask, out)


class _Rows:
    """The two operands of a call and their launches, of which `measure_tiles` is the first.

    Nothing is launched if N = 0. A kernel takes the operands, the workspace and V before its own
    arguments, and PDL, ALIGNED, LANES and TILE after them.
    """

    def __init__(
        self,
        adapted: Tensor,
        base: Tensor,
        workspace: Tensor | None,
        BASE: bool = False,
        marks: float | None = None,
    ) -> None:
        """`marks`: the alpha of the support whose cells the first pass marks, if it does."""
        self.count, self.vocab = adapted.shape
        size = workspace_size(self.count, self.vocab)
        if workspace is None:
            workspace = torch.empty(size, dtype=torch.float32, device=adapted.device)
        assert workspace.dtype == torch.float32 and workspace.is_contiguous()
        assert workspace.numel() >= size, f"workspace: {workspace.numel()} elements, {size} needed"
        self.workspace = workspace
        self.operands = adapted, adapted.stride(0), base, base.stride(0), workspace, self.vocab
        self.aligned = aligned(adapted, base)
        self.overlaps = overlaps(adapted.device)
        # What a thread loads at once, so that a cell is what a thread holds.
        self.chunk = 16 // min(adapted.itemsize, base.itemsize) if self.aligned else 1
        self._stream(
            measure_tiles, *self.operands, 0.0 if marks is None else log_alpha(marks),
            MARKED=marks is not None, CHUNK=self.chunk, ALIGNED=self.aligned, BASE=BASE,
            maxnreg=MEASURE_REGISTERS if self.aligned and not BASE else STREAM_REGISTERS,
        )  # fmt: skip

    def steering(self, mask: Mask) -> tuple[Any, ...]:
        strength = _per_row(mask.strength, self.workspace)
        return *strength, log_alpha(mask.alpha), mask.penalty, int(mask.is_difference)

    def each_tile(self, kernel: Any, *arguments: Any, **options: Any) -> None:
        """Launch one program per tile of every row."""
        combined = self.count >= MANY_ROWS
        if combined:
            self.combine()
        options = {"ALIGNED": self.aligned} | self._after() | options
        self._stream(kernel, *self.operands, int(combined), *arguments, **options)

    def each_row(self, kernel: Any, *arguments: Any, **options: Any) -> None:
        """Launch one program per row."""
        options |= {
            "ALIGNED": self.aligned, "num_warps": ROW_WARPS, "maxnreg": ROW_REGISTERS,
        } | self._after()  # fmt: skip
        self._launch(kernel, self.count, *self.operands, *arguments, **options)

    def combine(self) -> None:
        """Combine the tiles of each row once, for the programs of its tiles."""
        self.settle(combine_rows)

    def settle(self, kernel: Any, *arguments: Any) -> None:
        """Launch one program per row on what the workspace holds of it."""
        own = self.workspace, self.vocab, *arguments
        self._launch(kernel, self.count, *own, num_warps=1, **self._after())

    def _stream(self, kernel: Any, *arguments: Any, **options: Any) -> None:
        tiles = _tiles(self.vocab)
        options = {"num_warps": STREAM_WARPS, "maxnreg": STREAM_REGISTERS} | options
        self._launch(kernel, self.count * tiles, *arguments, *reciprocal(tiles), **options)

    def _after(self) -> dict[str, Any]:
        """Options of a kernel that may be launched while the one before it still runs."""
        return {"launch_pdl": True} if self.overlaps else {}

    def _launch(self, kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
        if programs == 0:
            return
        options |= {"PDL": self.overlaps, "LANES": _lanes(self.vocab), "TILE": TILE}
        with torch.cuda.device_of(self.workspace):  # Triton launches on the current device
            kernel[(programs,)](*arguments, **options, enable_fp_fusion=True)


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a device can start a kernel's programs before the kernel before it has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _tiles(vocab: int) -> int:
    return -(-vocab // TILE)


def reciprocal(divisor: int) -> tuple[int, int]:
    """Return (r, s): n // divisor is the high word of 2 n r, shifted right by s, for 0 <= n < 2^31.

    Both words are of 32 bits. Theorem 4.2 of Granlund and Montgomery, 1994.
    """
    shift = (divisor - 1).bit_length()
    return -(-(1 << 31 + shift) // divisor), shift


def _lanes(vocab: int) -> int:
    """A row's tiles in whole warps, so that few V differ in it."""
    return -(-_tiles(vocab) // 32) * 32


def aligned(*rows: Tensor) -> bool:
    """Whether 16-byte loads and stores fit every row, however many rows there are."""
    return all(
        x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0 and x.shape[1] % 8 == 0
        for x in rows
    )


def _per_row(value: PerRow[Any], unread: Tensor) -> tuple[Any, Tensor, int]:
    """What `triton_rows.per_row` takes; `unread` stands where there is no tensor."""
    number, each = value
    return (number, unread, 0) if each is None else (number, each.contiguous(), 1)


def _noise(draw: Draw, unread: Tensor) -> tuple[Any, ...]:
    return draw.temperature, *_per_row(draw.seed, unread), *_per_row(draw.position, unread)
