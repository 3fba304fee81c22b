"""Rows of logits on which operators have gone wrong, at the size that a backend's tile asks for."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

INF, NAN = math.inf, math.nan
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAMES = {F32: "float32", BF16: "bfloat16", F16: "float16"}
TILE = 2048  # the tokens that a GPU backend takes at once
Pair = tuple[Tensor, Tensor]


def likeliest(z: Tensor) -> Tensor:
    return z.float().nan_to_num(-1e9, -1e9, -1e9).argmax(-1)


def logits(
    n: int, vocab: int, device: str, dtype: torch.dtype = F32, base: torch.dtype | None = None,
    spread: float = 3.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Drawn on the CPU, so that they are the same everywhere."""
    generator = torch.Generator().manual_seed(n * 1_000_003 + vocab)
    z = torch.randn(n, vocab, generator=generator) * spread
    b = z + torch.randn(n, vocab, generator=generator)
    return z.to(dtype).to(device), b.to(base or dtype).to(device)


class Scale(NamedTuple):
    """Where a case is built, and for which tile: a smaller tile makes shorter rows of as many."""

    device: str
    tile: int = TILE

    def of(self, tokens: int) -> int:
        """The size in place of one that was chosen for tiles of 2048."""
        return tokens * self.tile // TILE

    def logits(self, n: int, vocab: int, *dtypes: torch.dtype, **spread: float) -> "Pair":
        return logits(n, vocab, self.device, *dtypes, **spread)


Inputs = Callable[[Scale], Pair]


def impossible(z: Tensor, b: Tensor, tile: int) -> Pair:
    """Nine rows with -inf wherever it has been got wrong: in one row, in both, in whole tiles."""
    z[0, :tile] = -INF
    z[1, tile:] = -INF
    b[2, : 2 * tile] = -INF
    z[3, 10:-10] = b[3, 10:-10] = -INF
    b[4] = -INF  # no opinion at all
    z[5], z[5, -10] = -INF, -4.0  # one token
    b[6, z[6].argmax()] = -INF
    z[7, ::2], b[7, 1::2] = -INF, -INF
    z[8, :-1] = b[8, :-1] = -INF
    return z, b


def stretches(s: Scale) -> Pair:
    """-inf in blocks of the adapted, the base, both, and of a base that underflows."""
    z, b = s.logits(8, s.of(2016))
    first, last = s.of(256), s.of(1100)
    z[0, first:last] = -INF
    b[1, s.of(100) : s.of(900)] = -INF
    z[2, : s.of(1500)], b[2, : s.of(1500)] = -INF, -INF
    z[3, 1:] = -INF
    z[4, ::3] = -INF
    b[5, ::3] = -INF
    z[6, 10], b[6, 10] = -500.0, -INF  # p underflows, and the divergence is infinite
    z[7, s.of(300) :] = -INF
    return z, b


def ties(s: Scale, odd: int) -> Pair:
    z, b = s.logits(5, s.of(4800) + odd)
    tied = [(7, 8), (3, s.tile - 1), (s.tile - 1, s.tile), (s.of(3200), s.of(4000))]
    tied += [(1, s.of(1024))]
    for row, tokens in enumerate(tied):
        z[row, list(tokens)], b[row, list(tokens)] = 50.0, 48.0
    return z, b


def flat(s: Scale) -> Pair:
    """Every token at the top, steered apart or not."""
    z, b = s.logits(4, s.of(5024))
    z[:2], b[1:3] = 1.25, 1.25
    z[2], z[3] = 1.25, z[3].round()
    b[3] = z[3]
    return z, b


def orders(s: Scale) -> Pair:
    """Ties within, between and beyond tiles, signed zeros, and rows with few tokens possible."""
    z, b = s.logits(7, s.of(4800) + 1)
    far = s.of(4704)
    z[0, far], z[0, 30], z[0, s.of(2112)] = 50.0, 50.0, 49.0
    b[0] = z[0]
    z[1], b[1] = 1.0, 0.0
    z[2] = b[2] = (z[2].abs() / 2).round()
    z[3, 40:] = b[3, 40:] = -INF
    z[4, : s.of(4000)] = -INF
    z[5, ::2], z[5, 1::2], b[5] = 0.0, -0.0, 0.0  # equal
    z[6, s.of(1280) : s.of(2400)] = z[6, 30]  # of one logit, some of one delta
    b[6, s.of(1280) : s.of(2240) : 3] = b[6, 30]
    return z, b


def tails(s: Scale) -> Pair:
    """Equal from a token on, which then is the first of them."""
    z = s.logits(5, s.of(3008))[0].round()
    b = z - 2
    for row, at in enumerate((len(z[0]) - 1, s.of(256), s.of(256) - 1, 0)):
        z[row, at:], b[row, at:] = 50.0, 49.0
    return z, b


def underflow(s: Scale) -> Pair:
    z, b = s.logits(7, s.of(4512))
    z[0, 5] += 500.0  # p of the rest underflows
    z[1, 5] += 500.0
    b[1, 6] += 500.0
    z[2] -= 1e4
    b[3] += 1e4
    b[4, 7], z[4, 8] = -INF, z[4].max() + 300.0  # p of token 7 is 0 but for rounding
    z[5] *= 20.0
    z[6, 1:], b[6, 1:] = -3e4, -2e4
    return z, b


def shifted(s: Scale) -> Pair:
    """Rows far apart, near each other, and shifted."""
    z, b = s.logits(8, s.of(3008))
    z[0] += 4096
    b[1] -= 64
    b[2] = z[2] + 1e-3 * b[2]
    b[3] = z[3]
    z[4], b[4] = 10 * z[4], 10 * b[4]
    z[5] *= 1000
    b[6] *= 1e4
    z[7], b[7] = 0.0, 0.0
    return z, b


def huge(s: Scale) -> Pair:
    z, b = s.logits(2, s.of(4512))
    z[0], b[0] = z[0] * 1e30, b[0] * 1e-30
    z[1], b[1] = z[1] * 1e15, b[1] * 1e15
    return z, b


def certain(s: Scale) -> Pair:
    z, b = s.logits(4, s.of(9600))
    z[1] = 0.25  # flat: every token is support
    z[2, 100] = 40.0  # near-certain: p of the rest is 1e-14, and so is the variance
    z[3, 100] = 12.0
    return z, b


def pushed(s: Scale) -> Pair:
    """All but one of the tokens hold 1e-6 of the mass, and the support is pushed below them."""
    z, b = s.logits(1, s.of(9600), spread=0.5)
    z[0, 70] += 18.0
    b[0, 70] = z[0, 70] - 30.0
    return z, b


def spoilt(s: Scale, where: int, value: float) -> Pair:
    """Rows 1 to 3 have the value, the last has no token at all."""
    rows = s.logits(6, s.of(4512))
    rows[0][:, 65] = -INF
    rows[0][5] = -INF
    rows[where][1, 0] = rows[where][1, -1] = value
    rows[where][2, 65] = value  # base: where the adapted row is -inf
    rows[where][3] = value
    return rows


def spoilt_in_both(s: Scale) -> Pair:
    z, b = s.logits(5, s.of(2016))
    b[0, 9], z[0, 9] = NAN, -INF
    z[1, 0], b[1, 0] = NAN, NAN
    z[2, : s.of(256)] = NAN
    z[3, -2], b[3, s.of(1024)] = INF, NAN
    return z, b


def some_flat(s: Scale) -> Pair:
    z, b = s.logits(3, s.of(4512), spread=1.0)
    z[1] = 0.25  # flat: every token is support at any alpha
    z[2] = z[2].round()  # many at the top
    return z, b


def gaps(s: Scale) -> Pair:
    z, b = s.logits(4, s.of(2496))
    z[:, ::7] = -INF
    return z, b


def repeated(s: Scale) -> Pair:
    z, b = s.logits(2, s.of(2496))
    return z.repeat(3, 1), b.repeat(3, 1)


def equals(s: Scale, vocab: int) -> Pair:
    """Half of the tokens at 1, a quarter at 0, a quarter at -0; every third far above."""
    z = torch.zeros(12, vocab, device=s.device)
    z[:, ::2] = 1.0
    z[:, 2::4] = -0.0
    z[:3] = 0.0
    z[0, ::3], z[1, [3, 63, 64]] = 5.0, 30.0
    return z, z.clone()


def large_supports(s: Scale) -> Pair:
    z, b = s.logits(3, s.of(9600), spread=0.5)
    z[1], z[2] = z[1] * 1e6, z[2].round()
    return z, b


def view(s: Scale, lead: int, base: bool = False) -> Pair:
    """A row of a wider tensor whose other columns are NaN."""
    z, b = s.logits(3, s.of(2304), BF16)
    wide = torch.full((3, s.of(2304) + 24), NAN, dtype=BF16, device=s.device)
    view = wide[:, lead : lead + s.of(2304)]
    view.copy_(b if base else z)
    return (z, view) if base else (view, b)


def odd(s: Scale) -> Pair:
    z, b = s.logits(3, s.of(2304), BF16)
    odd = torch.full((6, s.of(2304) + 1), NAN, dtype=BF16, device=s.device)[::2, : s.of(2304)]
    return z, odd.copy_(b)


def slices(s: Scale) -> Pair:
    z, b = s.logits(6, 711)
    return z[::2, 1:701], b[1::2, 5:705]
