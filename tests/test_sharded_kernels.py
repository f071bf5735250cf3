"""The kernels of a slice of a split vocabulary beside plain PyTorch, with every instruction set."""

import torch
from torch import Tensor

from fastadapt._ops.philox import philox
from fastadapt._ops.sharded import arithmetic
from fastadapt._ops.sharded.arithmetic import LAST_ID, ordered
from fastadapt._ops.sharded.slice import NAN, Slice
from fastadapt._ops.sharded.support import Support, Tokens
from fastadapt.reference.arithmetic import exp64, log64, masses
from fastadapt.reference.distribution import Distribution


class PlainSlice:
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


def test_kernels_are_the_plain_operations(cpu_capability):
    """Each function of a slice beside the same in PyTorch, under every kind of test."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = (torch.randn(5, 2311) * 3).to(dtype)
        rows[3, 100:1900] = float("-inf")
        rows[4] = (torch.randint(4, (2311,)) * 2).to(dtype)
        mine, plain = (kind(rows, 700, 9000) for kind in (Slice, PlainSlice))
        assert torch.equal(mine.maxima(), plain.maxima())
        for count in (1, 64, 2400):
            assert_equal(mine.best(count), plain.best(count))
        row = torch.tensor([4, 3, 3, 2, 1, 0, 0])
        inverse = torch.tensor([1, 1, 0.7, 1, 1 / 3, 1, 2])
        support = Support.whole(row, inverse, rows.amax(1).float()[row] * inverse)
        key = arithmetic.key_of(support.m - 2, torch.full((7,), 1500))
        typical = arithmetic.key_of(torch.full((7,), -1.5), torch.full((7,), 2000))
        least = support.least.index_fill(1, torch.tensor([0, 2]), 10**9)
        guard = support.guard.index_fill(1, torch.tensor([0, 2]), int(key[3]))
        centre = torch.full((7,), 2.5)
        for some in (
            support,
            support._replace(cut=key),
            support._replace(least=least, guard=guard),
            support._replace(centre=centre, band=typical),
            support._replace(
                cut=key - 2**33, least=least, guard=guard, centre=centre, band=typical
            ),
        ):
            sums = plain.tally(some)
            assert torch.equal(mine.tally(some), sums)
            for kind, end in (("rank", key), ("typicality", typical)):
                steps = torch.arange(-40, 24) << 28
                pivots = end[:, None] + steps
                expected = plain.tally_above(some, kind, pivots)
                assert torch.equal(mine.tally_above(some, kind, pivots), expected)
                for count in (1, 64, 300):
                    found = plain.best_below(some, kind, end, count)
                    assert_equal(mine.best_below(some, kind, end, count), found)
            alive = (sums[:, 1] > 0).nonzero()[:, 0]
            for part in (0.0, 0.3, 0.9):
                target = (sums[alive, 1] * part).long()
                assert_equal(mine.find(some.at(alive), target), plain.find(some.at(alive), target))


def assert_equal(one, other):
    """Of several tensors."""
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_threads_share_a_long_row(num_threads):
    """With the bits of one."""
    torch.manual_seed(0)
    rows = torch.randn(1, 70_001) * 3
    support = Support.whole(torch.zeros(1, dtype=torch.int64), torch.ones(1), rows.amax(1))
    support = support._replace(cut=support.cut + (1 << 60))
    part = Slice(rows, 3, 80_000)

    def results():
        sums = part.tally(support)
        return sums, *part.best(64), *part.find(support, sums[:, 1] // 3)

    num_threads(1)
    alone = results()
    num_threads(4)
    assert_equal(alone, results())
    plain = PlainSlice(rows, 3, 80_000)
    assert torch.equal(alone[0], plain.tally(support))
    assert_equal(alone[3:], plain.find(support, alone[0][:, 1] // 3))


def test_empty_slices_have_nothing():
    part = Slice(torch.empty(2, 0), 5, 9)
    support = Support.whole(torch.arange(2), torch.ones(2), torch.zeros(2))
    assert part.tally(support).sum() == part.tally_above(support, "rank", support.guard).sum() == 0
    assert (part.best(3)[1] == -1).all()
    assert (part.best_below(support, "rank", support.cut, 2)[1] == -1).all()
    assert (part.maxima() == arithmetic.MINUS_INF).all()


def test_arithmetic_is_the_reference():
    torch.manual_seed(0)
    d = -torch.rand(3, 1001) * 30
    d[0, :4] = torch.tensor([0.0, -0.0, float("-inf"), -28.0])
    assert_equal(arithmetic.masses(d), masses(d))
    total = torch.randint(1, 2**58, (999,))
    assert torch.equal(arithmetic.log_mass(total), log64(total.double() / 2**40))
    x = -torch.rand(999, dtype=torch.float64) * 20
    assert torch.equal(arithmetic.exp64(x), exp64(x))
    seeds, positions = torch.randint(-(2**62), 2**62, (2, 999))
    law = Distribution(torch.zeros(999, 2), None)
    low, high, *_ = philox(seeds, positions)
    expected = law.draw_target(low, high, total)
    assert torch.equal(arithmetic.draw_target(seeds, positions, total), expected)
