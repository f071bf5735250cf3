"""The gradients of a linear head, summed tile by tile of its vocabulary."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastadapt._ops.linear.tiles import LowRank, RowWork

Triple = tuple[Tensor, Tensor, Tensor]
Quintuple = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # with both of an adapter


def empty_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    wanted: list[bool],
    *,
    dtype: torch.dtype | None = None,
) -> Triple:
    """Allocates the wanted gradients; that of hidden states is 0, as ignored rows have none.

    Their dtype is that of the inputs if none is given.
    """
    ids = weight.shape[0] if wanted[2] and bias is not None else 0
    return (
        hidden.new_zeros(hidden.shape if wanted[0] else (0, hidden.shape[1]), dtype=dtype),
        weight.new_empty(weight.shape if wanted[1] else (0, weight.shape[1]), dtype=dtype),
        weight.new_empty(ids, dtype=dtype),
    )


def empty_low_gradients(
    low: LowRank | None, like: Tensor, *, dtype: torch.dtype | None = None
) -> LowRank:
    """Allocates those of an adapter, that of its states 0; without one, nothing.

    Their dtype is that of the adapter if none is given.
    """
    if low is None:
        return LowRank(*(like.new_empty(0, 0, dtype=dtype) for _ in range(2)))
    states, weight = low
    return LowRank(
        states.new_zeros(states.shape, dtype=dtype), weight.new_empty(weight.shape, dtype=dtype)
    )


class HeadGradients:
    """Those of hidden states, weight and bias; each block of the weight's is written once.

    With `totals`, float32 (float64) gradients, those of hidden and low-rank states are written
    there, and those of weights and bias are added: the call's rows are a block of all that the head
    is given.

    Where there is an adapter, its two gradients are always made, a product of N * r * V each; they
    are summed in float32 (float64) and rounded once.

    Attributes:
        sums: (n, H), that of the hidden states of the rows that take part, in float32 (float64);
            complete once all tiles are added.
        low_sums: (n, r), the same of an adapter's states.
    """

    def __init__(
        self,
        work: RowWork,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        wanted: list[bool],
        totals: Quintuple | None = None,
        low: LowRank | None = None,
    ) -> None:
        """Allocates them for all rows; the head of `work` has those that take part."""
        self._work, self._weight, self._wanted = work, weight, wanted
        self._adds = totals is not None
        n, h = work.head.hidden.shape
        if totals is None:
            made = empty_gradients(hidden, weight, bias, wanted)
            totals = *made, *empty_low_gradients(low, hidden)
        self.dhidden, self.dweight, self.dbias, *of_low = totals
        self.dlow = LowRank(*of_low)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self._whole = self.dhidden.dtype == wide and work.head.places is None
        rows = n if wanted[0] else 0
        self.sums = self.dhidden if self._whole else hidden.new_empty(rows, h, dtype=wide)
        self.sums.zero_()
        self._ones = hidden.new_ones(1, n)
        self.low_sums = self.sums.new_zeros(n, self.dlow.states.shape[1])

    def tiles(self, width: int) -> Iterator[tuple[int, int, Tensor]]:
        """Yields the first and the last id (exclusive) of each tile, and a buffer for dL/dx."""
        n = self._work.head.hidden.shape[0]
        buffer = self._ones.new_empty(n * min(width, self._weight.shape[0]))
        for first, last in self._work.head.tiles(width):
            yield first, last, buffer[: n * (last - first)].view(n, last - first)

    def add(self, first: int, last: int, out: Tensor, label_gains: Tensor | None = None) -> None:
        """Adds dL/dx of a tile; labels' own entries, 0 there, reach weight and bias alone."""
        if self._wanted[0]:
            self._work.add_product(self.sums, out, self._work.ids(first, last))
        low = self._work.head.low
        if low is not None:
            self._work.add_low_product(self.low_sums, out, low.weight[first:last])
        if label_gains is not None and (self._wanted[1] or self._wanted[2] or low is not None):
            self._work.set_labels(first, label_gains, out)
        if low is not None:
            block = self.dlow.weight[first:last]
            total = block if self._adds else low.weight.new_zeros(block.shape)
            self._work.add_low_product(total, out.t(), low.states)
            if not self._adds:
                block.copy_(total)
        if self._wanted[1]:
            block = self.dweight[first:last]
            if not self._adds and block.dtype == out.dtype:
                torch.mm(out.t(), self._work.head.hidden, out=block)
            else:
                block = block if self._adds else block.zero_()
                self._work.add_product(block, out.t(), self._work.head.hidden)
        if self._wanted[2]:
            if self._adds:
                self._work.add_product(self.dbias[None, first:last], self._ones, out)
            else:
                self.dbias[first:last] = torch.mm(self._ones, out)[0]

    def finished(self) -> Quintuple:
        """Spreads the sums over all rows, rounded once; returns the gradients."""
        if self._wanted[0] and not self._whole:
            self._work.scatter(self.sums, None, self._work.head.places, self.dhidden)
        if self._work.head.low is not None:
            self._work.scatter(self.low_sums, None, self._work.head.places, self.dlow.states)
        return self.dhidden, self.dweight, self.dbias, *self.dlow
