"""Compares a step with the modules that it stands for, on a few tokens."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from svd_engine.model.layers import attention
from svd_engine.model.step.cpu import CpuStep
from svd_engine.model.step.cuda import CudaStep
from svd_engine.model.step.parts import NotDescribed

if TYPE_CHECKING:
    from svd_engine.model.runner import ModelRunner

PROMPTS = [[5, 3, 11, 7], [2, 9]]  # any tokens
TEXTS = torch.tensor([[4, 12, 8, 6], [13, 1, 10, 3]])  # that follow them
SIZES = 3, 1  # of the steps that read them
MANY = 10  # copies of both: more rows than a tile has
FAR = 100, 1100  # slots from prompt to text: in several parts of attention, a block each or more
LONGEST_WINDOW = 1 << 13  # that is tried
# Of the norm of hidden states or logits: rounding in two layers or more. Tiny random models have
# 1e-6 and 3e-2.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@torch.inference_mode()
def check(runner: "ModelRunner", step: CpuStep | CudaStep) -> None:
    """Raise NotDescribed unless a step gives what the modules give.

    It gives hidden states of three tokens, then logits of one, in ragged rows, which follow their
    prompts or, where there is a window, are so far away that some of a prompt is outside. A step
    that is compiled on each machine is also tried on many rows, and far away from the prompts.
    """
    models = 2 if runner.paired else 1
    with attention.recorded() as calls:
        runner.prefill(PROMPTS * models)
    windows = {call.window for call in calls if call.window is not None}
    gaps = {x for x in windows if x <= LONGEST_WINDOW}
    shapes = [(1, gap) for gap in sorted(gaps or {0})]
    if step.is_tried_at_length:
        shapes += [(MANY, 0), *((1, gap) for gap in FAR)]
    for copies, gap in shapes:
        runner.prefill(PROMPTS * copies * models, gap + sum(SIZES))
        if gap:
            _move_away(runner, gap)
        texts = TEXTS.repeat(copies * models, 1).to(runner.model.device)
        three, last = texts.split(SIZES, 1)
        error = max(
            _error(runner, step, partial(runner.extend, three)),
            _error(runner, step, partial(runner.step, last[:, 0])),
        )
        if not error <= TOLERANCE[step.dtype]:
            raise NotDescribed(f"in a trial the native step was off by {error:.2g}")


def _move_away(runner: "ModelRunner", gap: int) -> None:
    """Put a gap of zeros behind the prompt, and let the prompt weigh as much in spite of it."""
    for index in range(len(runner.model.get_decoder().layers)):
        values = runner.cache.stored(index)[1]
        values[:, :, : int(runner.positions.max())] *= gap
    runner.positions += gap - 2


def _error(runner: "ModelRunner", step: CpuStep | CudaStep, run: Callable[[], Tensor]) -> float:
    before = runner.positions.clone()
    want = run().float()
    runner.positions.copy_(before)
    runner.native = step
    try:
        got = run().float()
    finally:
        runner.native = None
    return float(((got - want).norm() / want.norm()).nan_to_num(torch.inf))
