"""The operators in plain PyTorch: the definition that every backend is tested against.

Rows are `[N, V]`: N sequences when decoding, N positions when scoring or calibrating. Arithmetic is
float64 where an input is float64 and float32 otherwise. Numbers in brackets are equations of Hu et
al., "Distribution-Aligned Decoding for Efficient LLM Task Adaptation", arXiv 2509.15888.

For every operator:

- A token whose adapted logit is -inf has probability 0 and is never chosen.
- A token whose base logit alone is -inf is not steered: its delta is 0 and it is not in mean_d.
- A row with NaN or +inf anywhere, without a finite adapted logit, or with a strength that is not
  finite gives NaN and token -1.
- Ties go to the lowest token id.

Names in the kernels, here and in Triton, CUDA C++ and CPU C++:

- z, b; d            adapted and base logits (C++: adapted, base); z - b, 0 where either is -inf
- peak; base_peak    max z of a row or tile; max b. Of a log-sum-exp: its greatest logit
- e; p               exp(z - peak); e / sum_exp, the probability under the adapted model
- sum_exp            sum of e over a row or tile; base_sum_exp: sum of exp(b - base_peak)
- in base            a token with b > -inf; sum_exp_in_base: the sum of e over those
- sum_exp_d; mean_d  sum of e * d; E_p[d] = sum_exp_d / sum_exp_in_base
- delta              the steering vector: p (mean_d - d)  (10), or mean_d - d as a difference;
                     0 for a token that is impossible or not in base
- support, threshold z >= threshold = peak + log(alpha)  (12); off the support: any other token
- steering; logit    strength and mask of a row; the steered logit, -inf for a removed token
- merit              logit, or (logit - peak) / temperature + noise, times the temperature if that
                     is below 1: the greatest is chosen
- log-sum-exp (lse)  peak + log(sum_exp) of steered logits; tempered: of logits / temperature
- sum_p, mean, spread, squares   of x = I delta: sum p, E_p[x], sum p (x - mean)^2, sum x^2
- tile; active       consecutive tokens of a row, summed together; a tile with a token left
- first, second pass measures every tile; reads again only the tiles that the operator needs
- down, up; down_x   LoRA's A `[r, in]` and B `[out, r]`; x down^T, of rows from `first_adapted` on
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

INF = math.inf
COLDEST = torch.finfo(torch.float32).tiny  # a temperature below it cuts as this one does
DIRECTIONS = ("projected", "difference")
# Of the noise: with another version a seed draws other tokens. Version 1 took the first word of a
# counter per token.
NOISE_VERSION = 2
Strength = float | Tensor


class Sampled(NamedTuple):
    token: Tensor  # [N] int64
    logprob: Tensor  # [N], log-softmax of the steered logits at `token`


class TopK(NamedTuple):
    logprob: Tensor  # [N, k], descending
    token: Tensor  # [N, k] int64


class Projection(NamedTuple):
    numerator: Tensor  # [N], <e_y - p, I delta>
    gauss_newton: Tensor  # [N], ||I delta||^2, the denominator of (20)
    newton: Tensor  # [N], Var_p(I delta), the denominator of (19)
    in_support: Tensor  # [N] bool


class Support(NamedTuple):
    """The support of each row, lowest token first, in C slots; a larger one is cut off."""

    token: Tensor  # [N, C] int64, -1 in an empty slot
    p: Tensor  # [N, C] adapted probability, 0 in an empty slot
    delta: Tensor  # [N, C] steering vector, 0 in an empty slot
    logp: Tensor  # [N], of the target under the adapted model
    logq: Tensor  # [N], of the target under the base
    mean_d: Tensor  # [N], E_p[d]
    divergence: Tensor  # [N], KL(p || q)
    size: Tensor  # [N] int64, tokens in the support, which may be more than C


class _RowStats(NamedTuple):
    z: Tensor  # [N, V] adapted logits
    p: Tensor  # [N, V] adapted probabilities
    mean_d: Tensor  # [N, 1]
    delta: Tensor  # [N, V] steering vector
    support: Tensor  # [N, V] bool
    valid: Tensor  # [N, 1] bool


def _wide(*rows: Tensor) -> list[Tensor]:
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in rows) else torch.float32
    return [x.to(dtype) for x in rows]


def _column(strength: Strength, like: Tensor) -> Tensor:
    return torch.as_tensor(strength, dtype=like.dtype, device=like.device).reshape(-1, 1)


def log_alpha(alpha: float) -> float:
    """Round log(alpha) to float32, so that every backend compares with the same number."""
    return float(torch.tensor(alpha, dtype=torch.float32).log())


def _row_stats(
    adapted: Tensor, base: Tensor, alpha: float, direction: str = "projected"
) -> _RowStats:
    z, b = _wide(adapted, base)
    peak = z.amax(-1, keepdim=True)
    valid = peak.isfinite() & (b < INF).all(-1, keepdim=True)
    p = (z - peak).exp()
    p = p / p.sum(-1, keepdim=True)
    in_base = b > -INF
    both = in_base & (z > -INF)
    d = torch.where(both, z - b, 0.0)
    sum_p_in_base = torch.where(in_base, p, 0.0).sum(-1, keepdim=True)
    mean_d = torch.where(sum_p_in_base > 0, (p * d).sum(-1, keepdim=True) / sum_p_in_base, 0.0)
    delta = torch.where(both, (p if direction == "projected" else 1) * (mean_d - d), 0.0)
    delta = torch.where(valid, delta, math.nan)
    return _RowStats(z, p, mean_d, delta, z >= peak + log_alpha(alpha), valid)


def _steered(
    adapted: Tensor,
    base: Tensor,
    strength: Strength,
    alpha: float,
    penalty: float,
    direction: str,
) -> tuple[Tensor, Tensor]:
    stats = _row_stats(adapted, base, alpha, direction)
    strength = _column(strength, stats.z)
    valid = stats.valid & strength.isfinite()
    # strength * -inf is never formed: it is NaN for strength 0 and +inf for a negative one.
    off = -INF if penalty == -INF else stats.z + strength.abs() * penalty
    steered = torch.where(stats.support, stats.z + strength * stats.delta, off)
    return torch.where(valid, steered, math.nan), valid[:, 0]


def steering_vector(adapted: Tensor, base: Tensor, direction: str = "projected") -> Tensor:
    """delta = (diag(p) - p p^T) g with g = -(log p - log q + 1)  (10), `[N, V]`.

    The base softmax cancels: with d = adapted - base, delta_i = p_i (E_p[d] - d_i).

    As a difference, delta is g less its mean under p: delta_i = E_p[d] - d_i, so adapted + strength
    * delta is (1 - strength) * adapted + strength * base up to a constant.
    """
    return _row_stats(adapted, base, 0.0, direction).delta


def steer(
    adapted: Tensor,
    base: Tensor,
    strength: Strength,
    *,
    alpha: float = 0.1,
    penalty: float = -INF,
    direction: str = "projected",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Steered logits  (12)-(14), `[N, V]` in `dtype`, by default that of `adapted`.

    for i in range(V):
        if adapted[i] >= max(adapted) + log(alpha):
            out[i] = adapted[i] + strength * delta[i]
        else:
            out[i] = -inf if penalty == -inf else adapted[i] + abs(strength) * penalty
    """
    steered, _ = _steered(adapted, base, strength, alpha, penalty, direction)
    return steered.to(dtype or adapted.dtype)


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
) -> Sampled:
    """Choose one token per row: the greatest of steered / temperature + gumbel_noise.

    At temperature 0 it is the greatest steered logit, and so it is just above: one below 1
    multiplies the noise instead, because the quotient would overflow. `top_k`, `top_p` and `min_p`
    first cut the distribution softmax(steered / temperature). `logprob` is taken before temperature
    and cuts: it equals `score` of the token.
    """
    steered, valid = _steered(adapted, base, strength, alpha, penalty, direction)
    merit = steered
    if temperature > 0:
        away = steered - steered.amax(-1, keepdim=True)
        tempered = (away / max(temperature, COLDEST)).log_softmax(-1)
        kept = cut(tempered, top_k, top_p, min_p) > -INF
        noise = gumbel_noise(seed, position, len(away), away.shape[1], away.device)
        merit = away / max(temperature, 1.0) + min(temperature, 1.0) * noise
        merit = torch.where(kept, merit, -INF)
    token = merit.argmax(-1)
    logprob = steered.log_softmax(-1).gather(-1, token[:, None])[:, 0]
    return Sampled(token.masked_fill(~valid, -1), logprob)


def cut(logprob: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Set to -inf what the cuts remove of log-probabilities `[N, V]`; one token always stays."""
    ordered, token = torch.sort(logprob, dim=-1, descending=True, stable=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    drop = (before >= top_p) | (ordered < ordered[:, :1] + (math.log(min_p) if min_p else -INF))
    if top_k:
        drop[:, top_k:] = True
    drop[:, 0] = False
    return logprob.masked_fill(torch.zeros_like(drop).scatter_(-1, token, drop), -INF)


def topk(
    adapted: Tensor,
    base: Tensor,
    strength: Strength,
    k: int,
    *,
    alpha: float = 0.1,
    penalty: float = -INF,
    direction: str = "projected",
) -> TopK:
    """The k greatest steered log-probabilities and their tokens, `[N, k]`."""
    steered, valid = _steered(adapted, base, strength, alpha, penalty, direction)
    token = torch.sort(steered, dim=-1, descending=True, stable=True).indices[:, :k]
    logprob = steered.log_softmax(-1).gather(-1, token)
    return TopK(logprob, token.masked_fill(~valid[:, None], -1))


def score(
    adapted: Tensor,
    base: Tensor,
    strength: Strength,
    target: Tensor,
    *,
    alpha: float = 0.1,
    penalty: float = -INF,
    direction: str = "projected",
) -> Tensor:
    """log_softmax(steer(adapted, base, strength))[target], `[N]`."""
    steered = _steered(adapted, base, strength, alpha, penalty, direction)[0]
    return steered.log_softmax(-1).gather(-1, target[:, None])[:, 0]


def project_strength(
    adapted: Tensor,
    base: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.1,
    direction: str = "projected",
) -> Projection:
    """Terms of the best strength for a token: numerator / gauss_newton is (20), / newton is (19).

    I delta is delta on the support and 0 off it.
    """
    stats = _row_stats(adapted, base, alpha, direction)
    delta = torch.where(stats.support, stats.delta, 0.0)
    mean = (stats.p * delta).sum(-1)
    spread = (stats.p * (delta - mean[:, None]).square()).sum(-1)
    numerator = delta.gather(-1, target[:, None])[:, 0] - mean
    in_support = stats.support.gather(-1, target[:, None])[:, 0] & stats.valid[:, 0]
    invalid = ~stats.valid[:, 0]
    return Projection(
        numerator.masked_fill(invalid, math.nan),
        delta.square().sum(-1).masked_fill(invalid, math.nan),
        spread.masked_fill(invalid, math.nan),
        in_support,
    )


def support(
    adapted: Tensor,
    base: Tensor,
    target: Tensor,
    capacity: int,
    *,
    alpha: float = 0.1,
    direction: str = "projected",
) -> Support:
    """List the support  (12) of each row in `capacity` slots, with what scores of targets need.

    With it, log_softmax(steer(adapted, base, strength, penalty=0))[target] of any strength is
    logp + strength * I delta_target - log1p(sum p * expm1(strength * delta)), over the slots.
    """
    stats = _row_stats(adapted, base, alpha, direction)
    listed = stats.support & (stats.z > -INF) & stats.valid
    slot = torch.where(listed, listed.cumsum(-1) - 1, capacity).clamp(max=capacity)
    token = slot.new_full((len(slot), capacity + 1), -1)
    every = torch.arange(slot.shape[1], device=slot.device).expand_as(slot)
    token = token.scatter_(-1, slot, every)[:, :capacity].contiguous()
    empty, at = token < 0, token.clamp(min=0)
    z, b = _wide(adapted, base)
    at_target, invalid = target[:, None], ~stats.valid
    logp, logq = (
        torch.where(
            x.gather(-1, at_target) > -INF, x.log_softmax(-1).gather(-1, at_target), -INF
        ).masked_fill(invalid, math.nan)[:, 0]
        for x in (z, b)
    )
    return Support(
        token,
        stats.p.gather(-1, at).masked_fill(empty, 0.0).masked_fill(invalid, math.nan),
        stats.delta.gather(-1, at).masked_fill(empty, 0.0).masked_fill(invalid, math.nan),
        logp,
        logq,
        stats.mean_d.masked_fill(invalid, math.nan)[:, 0],
        divergence(adapted, base),
        listed.sum(-1),
    )


def divergence(adapted: Tensor, base: Tensor) -> Tensor:
    """KL(p || q)  (6), `[N]` in nats; +inf where a token is possible in p and not in q."""
    z, b = _wide(adapted, base)
    valid = _row_stats(adapted, base, 0.0).valid
    logp, logq = z.log_softmax(-1), b.log_softmax(-1)
    terms = torch.where(z > -INF, logp.exp() * (logp - logq), 0.0)
    terms = terms.masked_fill((z > -INF) & (b == -INF), INF)
    return torch.where(valid, terms, math.nan).sum(-1)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    up_bias: Tensor | None = None,
    first_adapted: int = 0,
) -> Tensor:
    """x W^T + bias, `[M, out]`, plus (x down^T) up^T + up_bias in the rows from `first_adapted` on.

    x `[M, in]`, weight `[out, in]`, down `[r, in]`, up `[out, r]`; rounded once, to the dtype of x.
    """
    dtype = x.dtype
    parts = [x if part is None else part for part in (x, weight, bias, down, up, up_bias)]
    x, weight, wide_bias, wide_down, wide_up, wide_up_bias = _wide(*parts)
    out = x @ weight.T
    if bias is not None:
        out += wide_bias
    if down is not None:
        out[first_adapted:] += x[first_adapted:] @ wide_down.T @ wide_up.T
        if up_bias is not None:
            out[first_adapted:] += wide_up_bias
    return out.to(dtype)


def gumbel_noise(
    seed: int | Tensor,
    position: int | Tensor,
    n: int,
    vocab: int,
    device: torch.device | str = "cpu",
    first_token: int = 0,
) -> Tensor:
    """Standard Gumbel noise, float32 `[n, vocab]`: a function of (seed, position, token id)."""
    token = torch.arange(first_token, first_token + vocab, device=device).expand(n, vocab)
    seed, position = (
        torch.as_tensor(x, dtype=torch.int64, device=device).reshape(-1, 1).expand(n, vocab)
        for x in (seed, position)
    )
    bits = philox(seed, token, position)
    # Each tail is computed from the side where float32 is dense, so none of the 32 bits is lost.
    low = (bits.double() + 0.5) * 2.0**-32
    high = ((2**32 - 1 - bits).double() + 0.5) * 2.0**-32
    exponential = torch.where(bits < 2**31, -torch.log1p(-low), -torch.log(high))
    return -exponential.log().float()


def philox(seed: Tensor, token: Tensor, position: Tensor) -> Tensor:
    """Word token % 4 of Philox4x32-10 (Salmon et al. 2011).

    Key = seed, counter = (token // 4, position, 0): four tokens share the four words of a counter.
    Takes int64 tensors of one shape and returns 32 random bits per element, as int64. The 64-bit
    seed and position are split into words, low word first.
    """
    mask = 0xFFFFFFFF
    c0, c1, c2 = (token >> 2) & mask, position & mask, (position >> 32) & mask
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        # The int64 product overflows, but its 64 bits are those of the unsigned product.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high1 = (product0 >> 32) & mask, (product1 >> 32) & mask
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & mask, high0 ^ c3 ^ k1, product0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return torch.stack((c0, c1, c2, c3)).gather(0, (token % 4)[None])[0]
