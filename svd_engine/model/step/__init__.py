"""One decode step of a recognised decoder, run from a plan instead of by its modules."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from svd_engine.model.step import cpu, cuda, trial
from svd_engine.model.step.cpu import CpuStep
from svd_engine.model.step.cuda import CudaStep
from svd_engine.model.step.parts import NotDescribed
from svd_engine.model.step.read import read_plan
from svd_engine.model.step.widen import widen

if TYPE_CHECKING:
    from svd_engine.model.runner import ModelRunner

logger = logging.getLogger(__name__)


def use_native_step(runner: "ModelRunner", build_short: Callable[[], "ModelRunner"]) -> None:
    """Let a runner decode by one native call per step, where its model is recognised.

    build_short: builds a runner of a few layers of the same model, on which the step is compared
    with the modules. `runner.how` says which step runs, and why.
    """
    try:
        short = build_short()
        trial.check(short, _native(short))
        if short.model.dtype != torch.float32:  # in which wrong numbers hide behind rounding
            widen(short.model)
            trial.check(short, _native(short))
        runner.native = _native(runner)
    except NotDescribed as error:
        runner.how = f"module by module, because {error}"
    except Exception as error:  # a model may refer to layers that are left out
        logger.debug("No native step", exc_info=True)
        runner.how = f"module by module, because a trial failed: {type(error).__name__}"
    else:
        runner.how = runner.native.how


def _native(runner: "ModelRunner") -> CpuStep | CudaStep:
    plan = read_plan(runner)
    on_cpu = plan.norm.weight.is_cpu
    if (reason := (cpu if on_cpu else cuda).why_not(plan)) is not None:
        raise NotDescribed(reason)
    return CpuStep(plan) if on_cpu else CudaStep(plan)
