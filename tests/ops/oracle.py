"""What is right: every operator on a backend against float64 on the same device.

The tolerance is earned: |backend - float64| <= |float32 PyTorch - float64| + a few roundings of the
numbers that the element is made of.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from svd_engine.kernels import reference
from svd_engine.kernels.reference import Support

from .cases import BF16, DIFFERENCE, INF, OPERATORS, Case, Options, Outputs

SAMPLERS = ("sample greedy", "sample noisy", "sample cut")
POISON = 12345.0


class Slack(NamedTuple):
    """What a backend may err beyond float32 PyTorch, and why."""

    unit: float = 3e-7  # of what an element is made of: five float32 roundings
    # Of the largest number of the row, in addition. A GPU's exp is good to a few roundings, and the
    # compiler contracts and reorders.
    row: float = 0.0
    # The interpreter cuts float32 off to bfloat16 where a device rounds.
    truncates: bool = False


HOST = Slack()
INTERPRETER = Slack(truncates=True)
DEVICE = Slack(row=2.0**-20)


class WrongError(Exception):
    """What is not as the reference has it."""


class Answer(NamedTuple):
    """What an operator is to give on a case."""

    plain: Outputs  # in float32 PyTorch
    truth: Outputs  # in float64; of integers, the same as `plain`
    slack: Outputs  # for each element


class Worst:
    """The greatest error over its tolerance of what was compared."""

    def __init__(self) -> None:
        self.ratio = self.error = self.tolerance = 0.0

    def compare(self, what: str, got: Tensor, plain: Tensor, truth: Tensor, slack: Tensor) -> None:
        """got: the backend's; plain: float32 PyTorch's; truth: float64's. Raises WrongError."""
        if got.shape != truth.shape:
            raise WrongError(f"{what} has shape {list(got.shape)}, not {list(truth.shape)}")
        got, plain, truth = (x.double().reshape(len(x), -1) for x in (got, plain, truth))
        if not torch.equal(got.isnan(), truth.isnan()):
            raise WrongError(f"{what}: NaN in rows {_rows(got.isnan() != truth.isnan())}")
        wrong = got.isinf() != plain.isinf()
        wrong |= got.isinf() & (got != plain)
        if wrong.any():
            raise WrongError(f"{what}: infinities differ in rows {_rows(wrong)}")
        finite = got.isfinite() & plain.isfinite() & truth.isfinite()
        if not finite.any():
            return
        error = torch.where(finite, (got - truth).abs(), 0.0)
        tolerance = torch.where(finite, (plain - truth).abs() + slack.reshape(truth.shape), 1.0)
        ratio = error / tolerance
        at = ratio.argmax()
        if float(ratio.flatten()[at]) > self.ratio:
            self.ratio = float(ratio.flatten()[at])
            self.error, self.tolerance = float(error.flatten()[at]), float(tolerance.flatten()[at])


def _rows(wrong: Tensor) -> list[int]:
    return wrong.any(-1).nonzero().flatten().tolist()[:8]


class _Sizes:
    """How large the numbers are that results are made of, in float64; columns are `[N, 1]`."""

    def __init__(self, case: Case, slack: Slack) -> None:
        _, z, b, o, _ = case
        self.slack, self.options = slack, o
        self.z, self.b = z.double(), b.double()
        gap = (self.z - self.b).nan_to_num(0, 0, 0).abs()
        self.mu = torch.as_tensor(o.mu, device=z.device).double().abs().reshape(-1, 1)
        self.reach = gap.amax(-1, keepdim=True)  # E_p[d] has a rounding of it as its error
        penalty = -self.mu * o.penalty if o.penalty > -INF else 0.0
        self.penalty = penalty
        largest = self.z.nan_to_num(0, 0, 0).abs().amax(-1, keepdim=True)
        self.row = largest + self.mu.clamp(min=1.0) * self.reach + penalty + 1

    def vector(self) -> Tensor:
        """Of delta: p times the error of the mean, and its own roundings."""
        direction = self.options.direction
        share = self.z.softmax(-1).nan_to_num(0.0) if direction == "projected" else 1.0
        delta = reference.steering_vector(self.z, self.b, direction).nan_to_num(0.0)
        return 4 * share * self.reach + 3 * delta.abs()

    def steered(self) -> Tensor:
        logits = self.z.nan_to_num(0, 0, 0).abs()
        top = self.z.amax(-1, keepdim=True)
        kept = self.z >= top + reference.log_alpha(self.options.alpha)
        return logits / 4 + torch.where(kept, self.mu * self.vector(), self.penalty)

    def logprob(self, steered: Tensor, token: Tensor) -> Tensor:
        """Of log-probabilities at `token` `[N, k]`: the steered logit's, and the normaliser's."""
        size = self.steered()
        whole = (steered.softmax(-1).nan_to_num(0.0) * size).sum(-1, keepdim=True)
        logprob = steered.log_softmax(-1).gather(-1, token).nan_to_num(0, 0, 0)
        return size.gather(-1, token) + whole + logprob.abs() + 1

    def tolerance(self, size: Tensor, order: int = 1) -> Tensor:
        return self.slack.unit * size + self.slack.row * self.row**order


def answer(name: str, case: Case, slack: Slack) -> Answer:
    """What an operator is to give, and how far from it an element may be."""
    case, name = _along(name, case)
    _, z, b, o, _ = case
    run = OPERATORS[name].run
    plain = run(z.float(), b.float(), o, "reference", None)
    if len(z) == 0:
        return Answer(plain, plain, plain)
    truth = run(z.double(), b.double(), o, "reference", None)
    sizes = _Sizes(case, slack)
    if name in SAMPLERS:
        steered = _exactly_steered(case)
        at = plain[0].clamp(min=0)[:, None]
        exact = steered.log_softmax(-1).gather(-1, at)[:, 0]
        allowed = sizes.tolerance(sizes.logprob(steered, at))[:, 0]
        return Answer(plain, (plain[0], exact), (plain[0], allowed))
    if name == "project_strength":
        error = 4 * sizes.reach[:, 0]
        numerator, *squares, _ = (x.double().abs().nan_to_num(0, 0, 0) for x in truth)
        size = [error + numerator]
        size += [error * (slack.unit * error + 2 * x.sqrt()) + 4 * x for x in squares]
        orders = zip(size, (1, 2, 2), strict=True)
        allowed = [sizes.tolerance(x[:, None], order)[:, 0] for x, order in orders]
        return Answer(plain, (*truth[:3], plain[3]), (*allowed, plain[3]))
    if name == "support":
        at = plain[0].clamp(min=0)
        size = sizes.tolerance(sizes.vector()).expand_as(sizes.z).gather(-1, at)
        p = sizes.tolerance(4 * truth[1])
        nats = [1 + x.double().abs().nan_to_num(0, 0, 0)[:, None] for x in truth[3:7]]
        nats[2] = 4 * sizes.reach + nats[2]
        nats[0], nats[1] = nats[0] + sizes.row, nats[1] + sizes.row + sizes.reach
        each = [sizes.tolerance(3 * x)[:, 0] for x in nats]
        return Answer(plain, (plain[0], *truth[1:7], plain[7]), (at, p, size, *each, at[:, 0]))
    if name == "topk":
        return Answer(plain, truth, truth)  # the rest depends on the tokens
    if name == "divergence":
        size = 3 + truth[0].abs().nan_to_num(0, 0, 0)[:, None]
    elif name == "score":
        size = sizes.logprob(_exactly_steered(case), o.target[:, None])
    else:
        size = sizes.steered() if name == "steer" else sizes.vector()
    underflow = 1e-36 if name == "steering_vector" else 0.0
    return Answer(plain, truth, (sizes.tolerance(size).reshape(truth[0].shape) + underflow,))


def _along(name: str, case: Case) -> tuple[Case, str]:
    """The case with the operator's direction, and the operator that reads it."""
    options = replace(case.options, direction=OPERATORS[name].direction)
    return case._replace(options=options), name.removesuffix(DIFFERENCE)


def _exactly_steered(case: Case) -> Tensor:
    _, z, b, o, _ = case
    mask = dict(alpha=o.alpha, penalty=o.penalty, direction=o.direction)
    return reference.steer(z.double(), b.double(), o.mu, **mask)


OUTPUTS = {
    "topk": ("logprob", "token"),
    "project_strength": ("numerator", "gauss_newton", "newton", "in_support"),
    "support": Support._fields,
} | dict.fromkeys(SAMPLERS, ("token", "logprob"))


def check(
    name: str, backend: str, case: Case, slack: Slack | None = None, known: Answer | None = None
) -> Worst:
    """One operator on one case. Raises WrongError."""
    known = known or answer(name, case, slack or (DEVICE if case.z.is_cuda else HOST))
    case, name = _along(name, case)
    _, z, b, o, _ = case
    run, worst = OPERATORS[name].run, Worst()
    slack = slack or (DEVICE if z.is_cuda else HOST)
    plain, truth, allowed = known
    got = _steered_between(backend, case) if name == "steer" else run(z, b, o, backend, None)
    if len(z) == 0:
        shapes = [[list(x.shape) for x in y] for y in (got, plain)]
        if shapes[0] != shapes[1]:
            raise WrongError(f"shapes {shapes[0]}, not {shapes[1]}")
        return worst
    if name == "topk":
        _check_best(backend, case, slack, got, plain, worst)
        return worst
    for what, *parts in zip(OUTPUTS.get(name, (name,)), got, plain, truth, allowed, strict=True):
        if parts[1].is_floating_point():
            worst.compare(what, *parts)
        else:
            _equal(what, *parts[:2])
    if name == "steer" and z.dtype != torch.float32:
        check_narrow(run(z, b, o, backend, None)[0], got[0], z.dtype, slack)
    return worst


def _steered_between(backend: str, case: Case) -> Outputs:
    """`steer` in float32, written between columns that it must leave alone."""
    _, z, b, o, lead = case
    n, vocab = z.shape
    buffer = torch.full((n, lead + vocab + 8), POISON, device=z.device)
    out = buffer[:, lead : lead + vocab]
    got = OPERATORS["steer"].run(z, b, o, backend, out)
    if not (buffer[:, :lead] == POISON).all() or not (buffer[:, lead + vocab :] == POISON).all():
        raise WrongError("columns beside `out` are written")
    return got


def check_narrow(narrow: Tensor, wide: Tensor, dtype: torch.dtype, slack: Slack) -> None:
    """The output in the dtype of the logits is the float32 result, rounded once."""
    rounded = wide.to(dtype)
    if narrow.dtype != dtype:
        raise WrongError(f"it is {narrow.dtype}, not {dtype}")
    if slack.truncates and dtype == BF16:
        step = torch.finfo(dtype).eps * wide.abs()
        near = ((narrow.float() - wide).abs() <= step) | ~wide.isfinite()
        narrow = torch.where(near, rounded, narrow) if near.all() else narrow
    if not same(narrow, rounded):
        raise WrongError(f"in {dtype} it is not the float32 result, rounded")


def _check_best(
    backend: str, case: Case, slack: Slack, got: Outputs, plain: Outputs, worst: Worst
) -> None:
    """`topk`: the tokens in order, and the log-probabilities of those."""
    token = got[1]
    if not torch.equal(token, plain[1]):
        # Two roundings may order near ties in two ways, but each has to keep to its own.
        _, z, b, o, _ = case
        out = torch.empty(z.shape, device=z.device)
        steered = OPERATORS["steer"].run(z, b, o, backend, out)[0]
        order = torch.sort(steered, dim=-1, descending=True, stable=True).indices
        dead = steered.isnan().any(-1, keepdim=True)
        _equal("token", token, order.masked_fill(dead, -1)[:, : token.shape[1]])
    at = token.clamp(min=0)
    exact, sizes = _exactly_steered(case), _Sizes(case, slack)
    truth = exact.log_softmax(-1).gather(-1, at)
    worst.compare("logprob", got[0], plain[0], truth, sizes.tolerance(sizes.logprob(exact, at)))


def _equal(what: str, got: Tensor, want: Tensor) -> None:
    if got.shape != want.shape or got.dtype != want.dtype:
        raise WrongError(
            f"{what} is {got.dtype} {list(got.shape)}, not {want.dtype} {list(want.shape)}"
        )
    if not torch.equal(got, want):
        rows = _rows((got != want).reshape(len(got), -1))
        raise WrongError(
            f"{what} in rows {rows}: {got[rows[0]].tolist()}, not {want[rows[0]].tolist()}"
        )


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit, but for what a NaN carries."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def alone(name: str, backend: str, z: Tensor, b: Tensor, o: Options) -> None:
    """A row gives the same bits in a batch and alone. Raises WrongError."""
    run = OPERATORS[name].run
    together = run(z, b, o, backend, None)
    for i in sorted({0, 1, len(z) - 1}):
        single = run(z[i : i + 1], b[i : i + 1], o.row(i), backend, None)
        for got, want in zip(single, together, strict=True):
            if not same(got[0].double(), want[i].double()):
                raise WrongError(f"row {i} alone differs from the same row in a batch of {len(z)}")
