"""Shared by the driver of a linear head and the devices: the problem, its rows, the tile work."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Lora = tuple[Tensor, Tensor, float]  # A (r, H), B (V, r) and the scale of their product

ELSEWHERE = -1  # the place of a label that this head does not have
CAST_ROWS = 256  # of a float32 head that are cast at once for labels


class LowRank(NamedTuple):
    """An adapter beside a head: the product of the two is added to that of states and weight."""

    states: Tensor  # (N, r)
    weight: Tensor  # (V, r), with a group this rank's slice of it

    @classmethod
    def of_both(cls, states: Tensor | None, weight: Tensor | None) -> "LowRank | None":
        """Returns the adapter that an operator was given, which may be none."""
        return None if states is None or weight is None else cls(states, weight)


class Problem(NamedTuple):
    """The arguments that the operators of a linear head share, in the order of their schemas."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H), with a group this rank's slice of it
    labels: Tensor  # (N, K), ids of the whole vocabulary, each once a row, or ignored
    bias: Tensor | None  # (V,)
    softcap: float  # 0: none
    logit_scale: float
    ignore_index: int
    span: Tensor | None  # with a group: the first id of the slice, and the size of the whole
    group: str | None  # its name
    low_states: Tensor | None = None  # (N, r), of an adapter, in a dtype of their own
    low_weight: Tensor | None = None  # (V, r), the same

    @property
    def low(self) -> LowRank | None:
        """The adapter."""
        return LowRank.of_both(self.low_states, self.low_weight)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """N, H and r, 0 without an adapter."""
        n, h = self.hidden.shape
        return n, h, 0 if self.low_weight is None else self.low_weight.shape[1]

    @property
    def listed(self) -> Tensor:
        """(N, K), bool; the labels that are not ignored."""
        return self.labels != self.ignore_index

    @property
    def used(self) -> Tensor:
        """(N,), bool; the rows with a label."""
        return self.listed.any(1)


class Head(NamedTuple):
    """The rows that take part in a call, and the head."""

    hidden: Tensor  # (n, H), contiguous rows
    weight: Tensor  # (V, H), dtype of `hidden`, or float32
    labels: Tensor  # (n, K), rows of this weight, or ELSEWHERE
    listed: Tensor  # (n, K), bool; False where it is ignored
    places: Tensor | None  # (n,), their places among all rows; None: all of them
    bias: Tensor | None  # (V,), float32 or float64
    softcap: float
    scale: float
    low: LowRank | None = None  # of these rows, both float32 or float64, weight contiguous

    @classmethod
    def from_problem(cls, problem: Problem, takes: Tensor) -> "Head":
        """Selects the rows that take part; on a GPU this waits for the device."""
        labels, v, index = problem.labels, problem.weight.shape[0], places_of(takes)
        if index is not None:
            labels = labels.index_select(0, index)
        listed = labels != problem.ignore_index
        if problem.span is not None:
            labels = labels - problem.span[0]
        here = listed & (labels >= 0) & (labels < v)
        labels = torch.where(here, labels, ELSEWHERE).contiguous()
        shape = problem.softcap, problem.logit_scale
        matrix = problem.hidden, problem.weight, problem.bias
        head = cls.of_rows(index, *matrix, *shape, problem.low)
        return head._replace(labels=labels, listed=listed)

    @classmethod
    def of_rows(
        cls,
        index: Tensor | None,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float,
        scale: float,
        low: LowRank | None = None,
    ) -> "Head":
        """Selects the rows at places, None for all of them, without labels."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        bias = None if bias is None else bias.to(wide).contiguous()
        if index is not None:
            hidden = hidden.index_select(0, index)
        if low is not None:
            states = low.states if index is None else low.states.index_select(0, index)
            low = LowRank(*(x.to(wide).contiguous() for x in (states, low.weight)))
        labels = hidden.new_empty(hidden.shape[0], 0, dtype=torch.int64)
        return cls(hidden, weight, labels, labels >= 0, index, bias, softcap, scale, low)

    @property
    def weights(self) -> list[Tensor]:
        """The weight, and an adapter's."""
        return [self.weight] if self.low is None else [self.weight, self.low.weight]

    @property
    def has_label(self) -> Tensor:
        """(n, K), bool; whether this slice of the head has the label."""
        return self.labels >= 0

    @property
    def label_rows(self) -> Tensor:
        """(n, K); the label's row of the weight, a valid row where it is elsewhere."""
        return self.labels.clamp(min=0)

    def tiles(self, width: int) -> Iterator[tuple[int, int]]:
        """Yields the first and the last id (exclusive) of each tile."""
        v = self.weight.shape[0]
        return ((first, min(first + width, v)) for first in range(0, v, width))

    def mapped(self, products: Tensor) -> Tensor:
        """Scales and caps products to which the bias has been added."""
        z = products * self.scale
        return z if self.softcap == 0 else self.softcap * (z / self.softcap).tanh()

    def slope(self, logits: Tensor) -> Tensor:
        """Returns dz / dx at given logits."""
        if self.softcap == 0:
            return torch.full_like(logits, self.scale)
        return self.scale * (1 - (logits / self.softcap).square())

    def gather(self, values: Tensor) -> Tensor:
        """Selects the values of the rows that take part."""
        return values if self.places is None else values.index_select(0, self.places)

    def scatter(self, values: Tensor, out: Tensor) -> None:
        """Spreads values of the rows that take part over all rows, 0 elsewhere."""
        if self.places is None:
            out.copy_(values)
        else:
            out.zero_().index_copy_(0, self.places, values.to(out.dtype))


class TileRequest(NamedTuple):
    """What the forward wants of a tile beside the maximum and the sum."""

    moments: bool  # whether the sums of e (z - OTHERS_MAX) and of e^2 are made
    kept: Tensor | None  # (n, last - first) in the dtype of hidden: the products, for the backward
    # (n, H), over ids the sums of e^(z - OTHERS_MAX) dz/dx / scale W_j: they take a second product
    sums: Tensor | None = None
    low_sums: Tensor | None = None  # (n, r), with `sums` where there is an adapter, of its rows


class Gains(NamedTuple):
    """What the gradient of a row's other logits is made of: e (a + b d + c e).

    With d = z - OTHERS_MAX and e = e^d.
    """

    abc: Tensor  # (n, 3) float64
    moments: bool  # whether there are b and c


class RowWork(ABC):
    """What a device does with tiles of the vocabulary: products, and the work on their rows.

    Made for one call; what it allocates is reused from tile to tile.
    """

    tile: int  # ids a tile
    rows: int  # fewer at once would waste products
    wide_numbers: int  # of half precision that are made wide at once

    def __init__(self, head: Head) -> None:
        self.head = head
        self._cast: Tensor | None = None  # a buffer of a tile of a float32 head
        self._in_cast = 0, 0  # the tile that is there

    def ids(self, first: int, last: int) -> Tensor:
        """Returns a tile of the head, (last - first, H), in the dtype of the hidden states."""
        weight, dtype = self.head.weight[first:last], self.head.hidden.dtype
        if weight.dtype == dtype:
            return weight
        if self._cast is None or len(self._cast) < last - first:
            self._cast = weight.new_empty(weight.shape, dtype=dtype)
            self._in_cast = 0, 0
        tile = self._cast[: last - first]
        if self._in_cast != (first, last):
            self._in_cast = first, last
            tile.copy_(weight)
        return tile

    def backward_tile(self) -> int:
        """Returns the ids per tile in the backward, a divisor of `tile`."""
        return self.tile

    @classmethod
    @abstractmethod
    def scratch_bytes(cls, n: int, v: int, itemsize: int) -> tuple[int, int]:
        """Returns the bytes of a forward with one product, and of a backward beside its sums."""

    @classmethod
    def exps_bytes(cls, n: int, v: int, itemsize: int) -> int:
        """Returns the bytes that a frozen head's forward holds in addition, beside its sums."""
        return 0

    @abstractmethod
    def label_products(self) -> Tensor:
        """(n, K) float64; hidden times each label's row, undefined where it is elsewhere."""

    @abstractmethod
    def sum_tile(self, first: int, last: int, stats: Tensor, request: TileRequest) -> None:
        """Adds ids [first, last) to the statistics, with one product."""

    @abstractmethod
    def gradient_tile(
        self, first: int, last: int, stats: Tensor, gains: Gains, kept: Tensor | None, out: Tensor
    ) -> None:
        """Writes dL/dx of a tile, 0 at labels, (n, last - first)."""

    @abstractmethod
    def set_labels(self, first: int, label_gains: Tensor, out: Tensor) -> None:
        """Writes the labels' own entries of a tile's gradient."""

    def add_low_product(self, sums: Tensor, a: Tensor, b: Tensor) -> None:
        """Computes sums += a @ b; `a` is made as wide as `b` and the sums by blocks of its rows."""
        if a.dtype == sums.dtype:
            torch.addmm(sums, a, b, out=sums)
            return
        block = max(1, self.wide_numbers // max(1, a.shape[1]))
        for begin in range(0, a.shape[0], block):
            part = sums[begin : begin + block]
            torch.addmm(part, a[begin : begin + block].to(sums.dtype), b, out=part)

    @abstractmethod
    def add_product(self, sums: Tensor, a: Tensor, b: Tensor) -> None:
        """Computes sums += a @ b."""

    @staticmethod
    @abstractmethod
    def add_rows(
        sums: Tensor, source: Tensor, index: Tensor, gain: Tensor, factor: Tensor | None
    ) -> None:
        """Computes sums[r] = factor[r] sums[r] + the sum over K of gain[r] source[index[r]]."""

    @staticmethod
    @abstractmethod
    def scatter(sums: Tensor, gain: Tensor | None, index: Tensor | None, out: Tensor) -> None:
        """Computes out[index[r]] = gain[r] sums[r], rounded once."""


def places_of(takes: Tensor) -> Tensor | None:
    """Returns the places of rows that take part, None if all do; on a GPU this waits for it."""
    index: Tensor = takes.nonzero()[:, 0]
    return None if index.shape == takes.shape else index


def label_blocks(
    weight: Tensor, index: Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields rows of an index (n, K), a source of the weights that it names, and an index into it.

    All rows and the weight itself; of a float32 head over half precision blocks of rows, cast.
    """
    if weight.dtype != torch.float32 or dtype.itemsize == 4:
        yield slice(None), weight, index
        return
    step = max(1, CAST_ROWS // index.shape[1])
    for begin in range(0, index.shape[0], step):
        some = index[begin : begin + step]
        picked = weight.index_select(0, some.flatten()).to(dtype)
        places = torch.arange(some.numel(), device=some.device).view(some.shape)
        yield slice(begin, begin + step), picked, places


def contiguous_rows(source: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Returns rows with contiguous entries, and the index (n, K) into them."""
    if source.stride(1) == 1 or source.shape[1] == 1:
        return source, index
    picked = source.index_select(0, index.flatten()).contiguous()
    return picked, torch.arange(index.numel(), device=index.device).view(index.shape)
