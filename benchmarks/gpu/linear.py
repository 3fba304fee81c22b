"""The linear for few rows beside PyTorch's, on the matrices of three models.

Weights are cold, calls in a CUDA graph.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.measure import Call, per_call, sets, synchronize
from benchmarks.gpu.worker import Run, words
from svd_engine.kernels import reference
from svd_engine.model.layers import linear
from svd_engine.model.step.plan import Linear
from tests.ops.cases import BF16

Shapes = dict[str, tuple[int, int]]  # matrix -> outputs, inputs


def shapes(hidden: int, keys: int, inner: int, vocab: int) -> Shapes:
    """Return the shapes of a model's matrices."""
    return {
        "q, o": (hidden, hidden),
        "k, v": (keys, hidden),
        "gate, up": (inner, hidden),
        "down": (hidden, inner),
        "head": (vocab, hidden),
    }


MODELS = {
    "Qwen2.5-1.5B": shapes(1536, 256, 8960, 151936),
    "Qwen2.5-7B": shapes(3584, 512, 18944, 152064),
    "SmolLM2-135M": shapes(576, 192, 1536, 49152),
}
TINY: dict[str, Shapes] = {"tiny": {"q, o": (48, 64), "head": (211, 64)}}
ROWS, RANK = (1, 2, 4, 8, 16), 8
ULP = 2.0**-20  # of the sum of the terms' absolute values: float32 sums, in any order
NONE = (None, None, None)
CHUNK = 8192  # outputs checked at once


def _ours(device: str) -> Callable[..., None]:
    """Return the few-rows linear of `(x, layer, first, out)`; on a CPU the reference's."""
    if device == "cuda":
        from svd_engine.kernels import launch_linear

        return launch_linear.linear

    def stand_in(x: Tensor, layer: Linear, first: int, out: Tensor) -> None:
        down, up, _ = layer.low_rank or NONE
        out.copy_(reference.linear(x, layer.weight, None, down, up, None, first))

    return stand_in


def _layer(device: str, weight: Tensor, low_rank: linear.LowRank | None) -> Any:
    layer = Linear(weight, None, low_rank)
    if device != "cuda":
        return layer
    from svd_engine.kernels import launch_linear

    return launch_linear.join([layer])


class Matrix:
    """Copies of a weight, enough that a round trip finds the L2 cold, each with an adapter."""

    def __init__(self, run: Run, fan_out: int, fan_in: int) -> None:
        self.device, self.size = run.device, fan_out * fan_in * BF16.itemsize
        self.ours = _ours(run.device)
        generator = torch.Generator(device=run.device).manual_seed(fan_out + fan_in)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(shape, device=run.device, generator=generator, dtype=BF16)
            return drawn.mul_(scale)

        self.x = normal(max(ROWS), fan_in)
        self.out = torch.empty(max(ROWS), fan_out, device=run.device, dtype=BF16)
        self.weights, self.low_ranks = [], []
        for _ in range(sets(run.device, self.size, run.quick)):
            self.weights.append(normal(fan_out, fan_in, scale=fan_in**-0.5))
            self.low_ranks.append(
                (normal(RANK, fan_in, scale=fan_in**-0.5), normal(fan_out, RANK), None)
            )

    def check(self) -> float:
        """Return the greatest error over its tolerance.

        Raises if an error is too large or a row's bits depend on the number of rows.
        """
        half = max(ROWS) // 2
        weight, worst = self.weights[0], 0.0
        for low_rank in (None, self.low_ranks[0]):
            together = torch.full_like(self.out, torch.nan)
            layer = _layer(self.device, weight, low_rank)
            self.ours(self.x, layer, half, together)
            for rows in ROWS:
                begin = half - rows // 2
                part = slice(begin, begin + rows)
                alone = torch.full_like(self.out[:rows], torch.nan)
                self.ours(self.x[part], layer, rows // 2, alone)
                if self.device == "cuda" and not torch.equal(alone, together[part]):
                    raise RuntimeError(f"{rows} rows have other bits alone than among {2 * half}")
            worst = max(worst, self._error(together, low_rank, half))
        if worst > 1:
            raise RuntimeError(f"the error is {worst:.3g} of what is allowed")
        return worst

    def _error(self, got: Tensor, low_rank: linear.LowRank | None, first: int) -> float:
        down, up, _ = low_rank or NONE
        x, low = self.x.double(), None if down is None else down.double()
        worst = 0.0
        for start in range(0, got.shape[1], CHUNK):
            part = slice(start, start + CHUNK)
            weight = self.weights[0][part].double()
            high = None if up is None else up[part].double()
            truth = reference.linear(x, weight, None, low, high, None, first)
            sizes = x.abs(), weight.abs(), None, _absolute(low), _absolute(high), None, first
            allowed = truth.abs() * torch.finfo(BF16).eps / 2
            allowed += ULP * reference.linear(*sizes) + torch.finfo(BF16).tiny
            error = (got[:, part].double() - truth).abs() / allowed
            worst = max(worst, float(error.nan_to_num(torch.inf).max()))
        return worst

    def calls(self, name: str, rows: int) -> list[Call]:
        """Return one call per copy of the weight; the second half of the rows is adapted."""
        x, out, first = self.x[:rows], self.out[:rows], rows // 2
        pairs = zip(self.weights, self.low_ranks, strict=True)
        if name == "ours":
            layers = [_layer(self.device, w, None) for w, _ in pairs]
            return [partial(self.ours, x, layer, 0, out) for layer in layers]
        if name == "ours, LoRA":
            layers = [_layer(self.device, w, low) for w, low in pairs]
            return [partial(self.ours, x, layer, first, out) for layer in layers]
        if name == "torch":
            return [partial(nn.functional.linear, x, w) for w, _ in pairs]
        return [partial(_torch_lora, x, w, low, first) for w, low in pairs]

    def times(self, name: str, rows: int) -> dict[str, Any]:
        """Measure microseconds, and the rate at which the weight is read."""
        seconds = per_call(self.device, self.calls(name, rows), limit=0.03)
        return {"us": seconds * 1e6, "GB/s": self.size / seconds / 1e9}


def _absolute(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.abs()


def _torch_lora(x: Tensor, weight: Tensor, low_rank: linear.LowRank, first: int) -> Tensor:
    return linear.add_low_rank(nn.functional.linear(x, weight), x, low_rank, first)


def section(run: Run) -> dict[str, Any]:
    """Check every matrix against float64, then time it; a wrong one is not timed."""
    copy = run.before("bandwidth").get("GB/s")
    checked: list[dict[str, Any]] = []
    cases: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "copy GB/s": copy,
        "ours": "triton" if run.device == "cuda" else "reference",
        "checked": checked,
        "cases": cases,
        "skipped": [],
    }
    for model, matrices in (TINY if run.quick else MODELS).items():
        for name, shape in matrices.items():
            about = {"model": model, "matrix": name, "shape": "x".join(map(str, shape))}
            if run.left() < 1:
                result["skipped"].append({**about, "why": "time"})
                continue
            matrix = None  # frees the previous one
            try:
                matrix = Matrix(run, *shape)
                checked.append({**about, "of tolerance": matrix.check()})
                contenders = ["ours", "torch"]
                if name != "head":
                    contenders += ["ours, LoRA", "torch, LoRA"]
                for rows in ROWS:
                    for contender in contenders:
                        case = {**about, "rows": rows, "contender": contender}
                        case |= matrix.times(contender, rows)
                        if copy:
                            case["of copy"] = case["GB/s"] / copy
                        cases.append(case)
            except Exception as error:
                checked.append({**about, "error": words(error)})
                synchronize(run.device)
            run.keep(result)
    return result
