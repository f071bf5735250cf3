"""This rank's slice of the vocabulary: what its tokens come to, in PyTorch's integers."""

import torch
from torch import Tensor

from fastadapt._ops.sharded.arithmetic import LAST_ID, ordered
from fastadapt._ops.sharded.support import Support, Tokens

NAN = 0x7FFFFFFF  # the ordered integer of a row with NaN: above +inf's


class Slice:
    """Rows (N, V_r) of ids [first, first + V_r) of a whole of some size, edited."""

    def __init__(self, rows: Tensor, first: int = 0, whole: int = 0) -> None:
        """Takes float32, bfloat16 or float16."""
        self.rows, self.first, self.whole = rows, first, whole
        self.v = rows.shape[1]

    def maxima(self) -> Tensor:
        """The largest logit of each row as an ordered integer, int32 (N,)."""
        if self.v == 0:
            return self.rows.new_full((len(self.rows),), -0x7F800000, dtype=torch.int32)
        most = self.rows.float().amax(1)
        return torch.where(most.isnan(), NAN, ordered(most)).int()

    def best(self, count: int) -> tuple[Tensor, Tensor]:
        """The best of each row by (logit, id): float32 logits and int32 ids (N, count).

        Ids of places that are left over are -1.
        """
        x = self.rows.float()
        key = (ordered(x) << 31) | (LAST_ID - torch.arange(self.v, device=x.device))
        return self._listed(key, x, count)

    def _tokens(self, support: Support) -> Tokens:
        """All tokens as the problems see them."""
        x = self.rows[support.row].float()
        ids = torch.arange(self.first, self.first + self.v, device=x.device).expand_as(x)
        return Tokens.of(support, x, ids)

    def _listed(self, key: Tensor, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The logits and ids of the largest keys; those of the least integer are left out."""
        n = min(count, self.v)
        top = key.topk(n, dim=1)
        there = top.values > torch.iinfo(torch.int64).min
        ids = torch.where(there, top.indices + self.first, -1).int()
        values = torch.where(there, x.gather(1, top.indices), float("-inf"))
        missing = (0, count - n)
        pad = torch.nn.functional.pad
        return pad(values, missing, value=float("-inf")), pad(ids, missing, value=-1)

    def tally(self, support: Support) -> Tensor:
        """Number, mass and surprisal mass of the survivors, int64 (P, 3)."""
        tokens = self._tokens(support)
        alive = tokens.survive(support)
        return torch.stack([alive.sum(1), (tokens.w * alive).sum(1), (tokens.u * alive).sum(1)], 1)

    def tally_above(self, support: Support, kind: str, pivots: Tensor) -> Tensor:
        """The same of survivors from pivots on, ascending (P, G): (P, G, 3)."""
        tokens = self._tokens(support)
        alive = tokens.survive(support)
        place = torch.searchsorted(pivots, tokens.key(kind), right=True)  # how many it reaches
        p, g = pivots.shape
        counts = []
        for weight in (torch.ones_like(tokens.w), tokens.w, tokens.u):
            within = weight.new_zeros(p, g + 1).scatter_add_(1, place, weight * alive)
            counts.append(within.flip(1).cumsum(1).flip(1)[:, 1:])
        return torch.stack(counts, 2)

    def best_below(self, support: Support, kind: str, end: Tensor, count: int) -> list[Tensor]:
        """The best survivors with keys below `end` (P,): logits and ids (P, count) as `best`."""
        tokens = self._tokens(support)
        key = tokens.key(kind)
        wanted = tokens.survive(support) & (key < end[:, None])
        key = torch.where(wanted, key, torch.iinfo(torch.int64).min)
        return list(self._listed(key, tokens.x, count))

    def find(self, support: Support, target: Tensor) -> tuple[Tensor, Tensor]:
        """The first survivor by id whose running mass exceeds `target` (P,): its logit and id."""
        tokens = self._tokens(support)
        running = (tokens.w * tokens.survive(support)).cumsum(1)
        place = (running <= target[:, None]).sum(1).clamp(max=self.v - 1)[:, None]
        return tokens.x.gather(1, place)[:, 0], place[:, 0] + self.first
