"""One decode step of a recognised decoder, run from a plan instead of by its modules."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from svd_engine.model.step import cpu, cuda
from svd_engine.model.step.cpu import CpuStep
from svd_engine.model.step.cuda import CudaStep
from svd_engine.model.step.read import NotDescribed, read_plan

if TYPE_CHECKING:
    from svd_engine.model.runner import ModelRunner

logger = logging.getLogger(__name__)
PROMPT, NEW = [5, 3, 11], (2, 9)  # any tokens
# Of the norm of a token's hidden states. Of few rows the modules round as the step does.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def use_native_step(runner: "ModelRunner", build_short: Callable[[], "ModelRunner"]) -> None:
    """Let a runner decode by one native call per step, where its model is recognised.

    build_short: builds a runner of a few layers of the same model, on which the step is compared
    with the modules. `runner.how` says which step runs, and why.
    """
    try:
        short = build_short()
        _check(short, _native(short))
        runner.native = _native(runner)
    except NotDescribed as error:
        runner.how = f"module by module, because {error}"
    except Exception as error:  # a model may refer to layers that are left out
        logger.debug("No native step", exc_info=True)
        runner.how = f"module by module, because of a {type(error).__name__} in a trial"
    else:
        runner.how = runner.native.how


def _native(runner: "ModelRunner") -> CpuStep | CudaStep:
    plan = read_plan(runner)
    reasons = {}
    for kind, executor in ((CpuStep, cpu), (CudaStep, cuda)):
        if (reason := executor.why_not(plan)) is None:
            return kind(plan)
        reasons[kind] = reason
    raise NotDescribed(reasons[CpuStep if plan.norm.weight.is_cpu else CudaStep])


@torch.inference_mode()
def _check(runner: "ModelRunner", step: CpuStep | CudaStep) -> None:
    """Raise NotDescribed unless the step computes what the modules compute."""
    copies, errors = 2 if runner.paired else 1, []
    runner.prefill([PROMPT] * copies, max_new_tokens=len(NEW))
    for token in NEW:
        tokens = torch.full((copies, 1), token, device=runner.model.device)
        want = runner.extend(tokens).float()
        runner.positions -= 1
        runner.native = step
        try:
            got = runner.extend(tokens).float()
        finally:
            runner.native = None
        errors.append(float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max()))
    error = max(errors)
    if not error <= TOLERANCE[step.dtype]:
        raise NotDescribed(f"in a trial the native step was off by {error:.2g}")
