"""`steer` and `sample` over a vocabulary that is cut across the ranks of a process group.

Each rank has a slice `[N, V / ranks]` of both rows. Ranks exchange a few numbers per row, not the
rows: for `steer`, 20 bytes from each rank; for `sample`, 48 more, and 24 for each further candidate
that a cut needs. All compute with the same numbers in the same order, so all have the same tokens.

Slices have one width and follow one another in the order of ranks: pad the last with -inf in both
rows, as an impossible token. This is plain PyTorch, for any device that `torch.distributed` serves;
rows, arguments and results are otherwise those of `svd_engine.ops`.
"""

import math

import torch
from torch import Tensor
from torch import distributed as dist

from svd_engine.kernels import reference
from svd_engine.kernels.arguments import Mask, keywords
from svd_engine.kernels.reference import Sampled, Strength
from svd_engine.ops import checks

INF = math.inf


@torch.no_grad()
def steer(
    adapted: Tensor,
    base: Tensor,
    strength: Strength,
    *,
    alpha: float = 0.1,
    penalty: float = -INF,
    direction: str = "projected",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return this rank's slice of the steered logits, float32 `[N, V / ranks]`."""
    checks.rows(adapted, base, checks.ALL_DTYPES)
    mask = checks.mask(strength, alpha, penalty, direction, adapted)
    return _steered(adapted, base, mask, group)[0]


@torch.no_grad()
def sample(
    adapted: Tensor,
    base: Tensor,
    strength: Strength,
    *,
    alpha: float = 0.1,
    penalty: float = -INF,
    direction: str = "projected",
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Tensor = 0,
    position: int | Tensor = 0,
    group: dist.ProcessGroup | None = None,
) -> Sampled:
    """Choose one token per row, the same on every rank, by its id in the whole vocabulary.

    With top_k a rank sends its k best tokens; with other cuts alone it sends its whole slice.
    """
    checks.rows(adapted, base, checks.ALL_DTYPES)
    mask = checks.mask(strength, alpha, penalty, direction, adapted)
    draw = checks.draw(temperature, top_k, top_p, min_p, seed, position, adapted)
    steered, peak = _steered(adapted, base, mask, group)
    n, width = steered.shape
    first = dist.get_rank(group) * width
    # In float64, where merits of all ranks are equal only if they are equal in whole rows.
    merit = steered.double() - peak
    if temperature > 0:
        noise = reference.gumbel_noise(seed, position, n, width, steered.device, first)
        merit = merit / max(temperature, 1.0) + min(temperature, 1.0) * noise
    if draw.is_cut:
        best = torch.sort(steered, dim=-1, descending=True, stable=True).indices
        at = best[:, : top_k or width]
    else:
        at = merit.argmax(-1, keepdim=True)
    top = steered.amax(-1, keepdim=True)
    away = steered.double() - torch.where(top > -INF, top, 0.0)
    temperature = max(temperature, reference.COLDEST)
    part = (
        top, _sum_exp(away), _sum_exp(away / temperature),
        steered.gather(-1, at), merit.gather(-1, at), at + first,
    )  # fmt: skip
    gathered = _gathered(torch.cat([x.double() for x in part], -1), group)
    tops, sum_exp, tempered = gathered[..., :3].unbind(-1)  # [ranks, N]
    # [N, candidates] in the order of ranks, and so of tokens where they tie.
    columns = gathered[..., 3:].unflatten(-1, (3, -1)).permute(2, 1, 0, 3).flatten(2)
    logit, merit, token = columns
    top = tops.amax(0)
    if draw.is_cut:
        away, shares = logit - top[:, None], ((tops - top) / temperature).exp() * tempered
        logprob = away / temperature - shares.sum(0).log()[:, None]
        kept = reference.cut(logprob, top_k, top_p, min_p) > -INF
        merit = torch.where(kept, merit, -INF)
    chosen = merit.argmax(-1, keepdim=True)
    lse = top + ((tops - top).exp() * sum_exp).sum(0).log()
    logprob = (logit.gather(-1, chosen)[:, 0] - lse).to(steered.dtype)
    token = token.gather(-1, chosen)[:, 0].long()
    return Sampled(token.masked_fill(logprob.isnan(), -1), logprob)


def _steered(
    adapted: Tensor, base: Tensor, mask: Mask, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The steered slice, and the adapted peak of whole rows `[N, 1]`; NaN in spoilt rows."""
    is_wide = torch.float64 in (adapted.dtype, base.dtype)
    z, b = (x.to(torch.float64 if is_wide else torch.float32) for x in (adapted, base))
    in_base = b > -INF
    both = in_base & (z > -INF)
    d = torch.where(both, z - b, 0.0)
    peak, sum_exp, mean_d = _measured(z, b, d, in_base, group)
    p = (z - peak).exp() / sum_exp if mask.direction == "projected" else 1.0
    delta = torch.where(both, p * (mean_d - d), 0.0)
    strength = torch.as_tensor(keywords(mask)["strength"], dtype=z.dtype, device=z.device)
    strength = strength.reshape(-1, 1)
    off = -INF if mask.removes else z + strength.abs() * mask.penalty
    kept = z >= peak + reference.log_alpha(mask.alpha)
    valid = peak.isfinite() & strength.isfinite()
    steered = torch.where(kept, z + strength * delta, off)
    return torch.where(valid, steered, math.nan), peak


def _measured(
    z: Tensor, b: Tensor, d: Tensor, in_base: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`peak`, `sum_exp` and `mean_d` of whole rows, `[N, 1]`; a spoilt row's peak is NaN."""
    top = z.amax(-1, keepdim=True)
    e = (z - torch.where(top > -INF, top, 0.0)).exp()
    spoilt = (top == INF) | ~(b < INF).all(-1, keepdim=True)
    width = torch.full_like(top, z.shape[1])
    in_base_sum = torch.where(in_base, e, 0.0).sum(-1, keepdim=True)
    part = (
        top.masked_fill(spoilt, math.nan), e.sum(-1, keepdim=True), in_base_sum,
        (e * d).sum(-1, keepdim=True), width,
    )  # fmt: skip
    gathered = _gathered(torch.cat(part, -1), group)
    tops, widths = gathered[..., :1], gathered[..., -1]
    if z.device.type == "cpu" and (widths != z.shape[1]).any():  # a device would have to wait
        raise ValueError(
            f"slices of the vocabulary must have one width; got {widths[:, 0].int().tolist()}. Pad "
            "the last with -inf in both rows."
        )
    peak = tops.amax(0)
    scaled = gathered[..., 1:4] * (tops - peak).exp()
    sum_exp, sum_exp_in_base, sum_exp_d = scaled.sum(0).split(1, -1)
    mean_d = torch.where(sum_exp_in_base > 0, sum_exp_d / sum_exp_in_base, 0.0)
    return peak, sum_exp, mean_d


def _sum_exp(x: Tensor) -> Tensor:
    return x.exp().sum(-1, keepdim=True)


def _gathered(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """What every rank has, `[ranks, N, numbers]`."""
    gathered = part.new_empty(dist.get_world_size(group), *part.shape)
    if part.numel():
        dist.all_gather(list(gathered), part, group=group)
    return gathered
