"""What every rank knows of problems: their support, its sums, and the tokens that were sent."""

import torch
from torch import Tensor

from fastadapt._ops.sharded.arithmetic import LOWEST
from fastadapt._ops.sharded.exchange import Program, Request
from fastadapt._ops.sharded.slice import Slice
from fastadapt._ops.sharded.support import COUNT, MASS, Support, Tokens


class State:
    """P problems. All of it is the same on every rank, so that all decide alike.

    Attributes:
        part: this rank's slice.
        support: the tests so far.
        tokens: (P, L), those that ranks have sent, ranked.
        cover: (P,) int64; all survivors whose key by rank is not below are among the tokens.
        alive: (P, L) bool, which tokens survive and are not below the cover.
        complete: (P,) bool, they are all that survive.
        sums: (P, 3) int64, number, mass and surprisal mass of the survivors...
        counted: (P,) bool, ...where they are known.
        by_rank: (P, ranks) int64, the mass in each slice; known where counted and not complete.
    """

    def __init__(
        self, part: Slice, support: Support, tokens: Tokens, cover: Tensor, counts: Tensor
    ) -> None:
        """Takes the sums of each rank (ranks, P, 3), and a cover for all of them."""
        self.part, self.support, self.tokens, self.cover = part, support, tokens, cover
        self.sums = counts.sum(0)
        self.by_rank = counts[:, :, MASS].T.clone()  # which changes
        self.counted = torch.ones_like(cover, dtype=torch.bool)
        self.complete = torch.zeros_like(self.counted)
        self.refresh(self.complete)

    def refresh(self, changed: Tensor) -> None:
        """Says which tokens survive after some supports (P,) have changed, and sums them up."""
        alive = self.tokens.survive(self.support) & (self.tokens.ids >= 0)
        alive &= self.complete[:, None] | (self.tokens.by_rank >= self.cover[:, None])
        self.alive = alive
        listed = sums_of(self.tokens, alive)
        counted = self.counted & ~changed
        self.complete = self.complete | counted & (listed[:, COUNT] == self.sums[:, COUNT])
        self.counted = counted | self.complete
        self.sums = torch.where(self.complete[:, None], listed, self.sums)

    def settle(self, wanted: Tensor) -> Program[None]:
        """Makes the sums of some problems (P,) known: one gather where some are not."""
        index = (wanted & ~self.counted).nonzero()[:, 0]
        if len(index) == 0:
            return
        counts = yield Request("gather", self.part.tally(self.support.at(index)))
        self.take(index, counts.sum(0), counts[:, :, MASS].T)

    def take(self, index: Tensor, sums: Tensor, by_rank: Tensor) -> None:
        """Notes the sums of problems (p,)."""
        self.sums[index], self.by_rank[index] = sums, by_rank
        self.counted[index] = True
        self.refresh(torch.zeros_like(self.counted))

    def replace(self, index: Tensor, tokens: Tokens) -> None:
        """Gives problems (p,) other tokens, (p, L'): all that survive."""
        p, have = len(self.cover), self.alive.shape[1]
        width = max(have, tokens.ids.shape[1])
        fields = []
        for old, new in zip(self.tokens, tokens, strict=True):
            wide = old.new_zeros(p, width)
            wide[:, :have] = old
            wide[index] = 0
            wide[index, : new.shape[1]] = new
            fields.append(wide)
        grown = Tokens(*fields)
        grown.ids[:, have:].masked_fill_(grown.ids[:, have:] == 0, -1)
        grown.ids[index] = -1
        grown.ids[index, : tokens.ids.shape[1]] = tokens.ids
        order = torch.where(grown.ids >= 0, grown.by_rank, 2 * LOWEST).argsort(1, descending=True)
        self.tokens = grown.taken(order)
        self.complete[index] = True
        self.refresh(torch.zeros_like(self.counted))


def sums_of(tokens: Tokens, alive: Tensor) -> Tensor:
    """Number, mass and surprisal mass of some tokens of each problem, (P, 3)."""
    return torch.stack([alive.sum(1), (tokens.w * alive).sum(1), (tokens.u * alive).sum(1)], 1)
