"""Supports, one for each problem (a row under an adaptor), as tests that any rank can run."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt._ops.sharded.arithmetic import LOWEST, key_of, masses, with_ties

SENT = 64  # tokens that a rank sends
# the values at which a filter keeps all
NEUTRAL = {
    "top_k": 0.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
COUNT, MASS, SURPRISAL = range(3)  # of sums
# a place of the mass tests for each filter that has one
CUTS = ("min_p", "epsilon_cutoff", "eta_cutoff")


class Support(NamedTuple):
    """Tests of P problems. A token survives if it passes all of them.

    Attributes:
        row: (P,) int64, the row of each.
        inverse: (P,) float32, 1 / T.
        m: (P,) float32, the largest scaled logit of the whole row.
        cut: (P,) int64, the least key by scaled logit.
        least: (P, 3) int64, the least mass of each mass test...
        guard: (P, 3) int64, ...and the key from which on it does not matter.
        centre: (P,) float32, typical's U / Z.
        band: (P,) int64, the least key by typicality.
    """

    row: Tensor
    inverse: Tensor
    m: Tensor
    cut: Tensor
    least: Tensor
    guard: Tensor
    centre: Tensor
    band: Tensor

    @classmethod
    def whole(cls, row: Tensor, inverse: Tensor, m: Tensor) -> "Support":
        """All finite tokens of rows."""
        lowest = torch.full_like(row, LOWEST)
        zero, cuts = torch.zeros_like(row), (len(row), len(CUTS))
        least = zero[:, None].expand(cuts).clone()
        guard = lowest[:, None].expand(cuts).clone()
        return cls(row, inverse, m, lowest, least, guard, zero.float(), lowest.clone())

    def at(self, index: Tensor) -> "Support":
        """Those of some problems."""
        return Support(*(x[index] for x in self))

    def join(self, other: "Support") -> "Support":
        """These problems, and others after them."""
        return Support(*(torch.cat(pair) for pair in zip(self, other, strict=True)))


class Tokens(NamedTuple):
    """Tokens of each problem: keys, masses; (P, L) each."""

    x: Tensor
    ids: Tensor
    by_rank: Tensor
    by_typicality: Tensor
    w: Tensor
    u: Tensor

    @classmethod
    def of(cls, support: Support, x: Tensor, ids: Tensor) -> "Tokens":
        """Measures logits (P, L), float32, of ids (P, L), as the problems see them."""
        s = x * support.inverse[:, None]
        d = s - support.m[:, None]
        w, u = masses(d)
        kappa = (d + support.centre[:, None]).abs()
        # less than float32's range, a token is the least typical, but alive; -inf is not
        finite = s > float("-inf")
        typicality = torch.where(finite, (-kappa).clamp(min=torch.finfo(torch.float32).min), s)
        return cls(x, ids, key_of(s, ids), key_of(typicality, ids), w, u)

    def key(self, kind: str) -> Tensor:
        """The keys by "rank" or by "typicality"."""
        return self.by_rank if kind == "rank" else self.by_typicality

    def survive(self, support: Support) -> Tensor:
        """Whether tokens pass all tests, bool (P, L)."""
        alive = (self.by_rank >= support.cut[:, None]) & (
            self.by_typicality >= support.band[:, None]
        )
        for i in range(len(CUTS)):
            heavy = self.w >= support.least[:, i, None]
            alive &= heavy | (self.by_rank >= support.guard[:, i, None])
        return alive

    def at(self, index: Tensor) -> "Tokens":
        """Those of some problems."""
        return Tokens(*(x[index] for x in self))

    def taken(self, order: Tensor) -> "Tokens":
        """Those at places (P, L') of each problem."""
        return Tokens(*(x.gather(1, order) for x in self))


def above(key: Tensor) -> Tensor:
    """The lowest key of the next larger value."""
    return with_ties(key) + (1 << 31)
