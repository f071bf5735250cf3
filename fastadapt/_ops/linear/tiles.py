"""What the driver of a linear head shares with the devices: the problem, its rows, the row work."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ELSEWHERE = -1  # the place of a label that this head does not have


class Problem(NamedTuple):
    """The arguments that the operators of a linear head share, in the order of their schemas."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H), with a group this rank's slice of it
    labels: Tensor  # (N,), ids of the whole vocabulary
    bias: Tensor | None  # (V,)
    softcap: float  # 0: none
    logit_scale: float
    ignore_index: int
    span: Tensor | None  # with a group: the first id of the slice, and the size of the whole
    group: str | None  # its name

    @property
    def used(self) -> Tensor:
        """(N,) bool: the rows that are not ignored."""
        return self.labels != self.ignore_index


class Head(NamedTuple):
    """The rows that take part, and the head that they meet."""

    hidden: Tensor  # (n, H), contiguous rows
    weight: Tensor
    labels: Tensor  # (n,), rows of this weight, or ELSEWHERE
    places: Tensor | None  # (n,), their places among all rows; None: all of them
    bias: Tensor | None  # (V,), float32 or float64
    softcap: float
    scale: float

    @classmethod
    def from_problem(cls, problem: Problem, takes: Tensor) -> "Head":
        """Drops the other rows before the first product; on a GPU this waits for the device."""
        hidden, labels, v = problem.hidden, problem.labels, problem.weight.shape[0]
        index: Tensor | None = takes.nonzero()[:, 0]
        if index is not None and index.shape == labels.shape:
            index = None
        if index is not None:
            hidden, labels = hidden.index_select(0, index), labels.index_select(0, index)
        if problem.span is not None:
            labels = labels - problem.span[0]
        labels = torch.where((labels >= 0) & (labels < v), labels, ELSEWHERE)
        bias, wide = problem.bias, torch.promote_types(hidden.dtype, torch.float32)
        bias = None if bias is None else bias.to(wide).contiguous()
        return cls(
            hidden, problem.weight, labels, index, bias, problem.softcap, problem.logit_scale
        )

    @property
    def has_label(self) -> Tensor:
        """(n,) bool: whether this head has the label."""
        return self.labels >= 0

    @property
    def label_rows(self) -> Tensor:
        """(n,): rows of the weight that may be read, the label's where it is here."""
        return self.labels.clamp(min=0)

    def tiles(self, width: int) -> Iterator[tuple[int, int]]:
        """First id of each tile and the one after its last."""
        v = self.weight.shape[0]
        return ((first, min(first + width, v)) for first in range(0, v, width))

    def mapped(self, products: Tensor) -> Tensor:
        """Logits from products to which a bias has been added."""
        z = products * self.scale
        return z if self.softcap == 0 else self.softcap * (z / self.softcap).tanh()

    def slope(self, logits: Tensor) -> Tensor:
        """dz / dx at mapped logits."""
        if self.softcap == 0:
            return torch.full_like(logits, self.scale)
        return self.scale * (1 - (logits / self.softcap).square())

    def gather(self, values: Tensor) -> Tensor:
        """The values of the rows that take part, from those of all rows."""
        return values if self.places is None else values.index_select(0, self.places)

    def scatter(self, values: Tensor, out: Tensor) -> None:
        """Values of the rows that take part among all rows; 0 elsewhere."""
        if self.places is None:
            out.copy_(values)
        else:
            out.zero_().index_copy_(0, self.places, values.to(out.dtype))


class TileRequest(NamedTuple):
    """What a tile of the forward gives beside the maximum and the sum."""

    weighted: bool  # whether the weighted sum is made
    kept: Tensor | None  # (n, last - first) in the dtype of hidden: the products, for the backward
    # (n, H), over ids the sums of e^(z - OTHERS_MAX) dz/dx / scale W_j: they take a second product
    sums: Tensor | None


class RowWork(ABC):
    """The work of one device on tiles of the vocabulary: products and what happens to their rows.

    Made for one call; what it allocates is reused from tile to tile.
    """

    tile: int  # ids a tile

    def __init__(self, head: Head) -> None:
        """For these rows."""
        self.head = head

    def backward_tile(self) -> int:
        """Ids a tile in the backward; divides `tile`."""
        return self.tile

    @classmethod
    @abstractmethod
    def scratch_bytes(cls, n: int, v: int, itemsize: int) -> tuple[int, int]:
        """What a forward without a second product holds, and a backward beside its sums."""

    @classmethod
    def exps_bytes(cls, n: int, v: int, itemsize: int) -> int:
        """What a frozen head's forward holds beside that and its sums."""
        return 0

    def will_write(self, out: Tensor) -> None:  # noqa: B027  (nothing to do is a way to do it)
        """Called with what will be written from end to end."""

    @abstractmethod
    def label_products(self) -> Tensor:
        """(n,) float64: hidden times the label's row, sums of float32 at least; any elsewhere."""

    @abstractmethod
    def sum_tile(self, first: int, last: int, stats: Tensor, request: TileRequest) -> None:
        """One product: ids [first, last) join the statistics."""

    @abstractmethod
    def gradient_tile(
        self, first: int, last: int, stats: Tensor, gains: Tensor, kept: Tensor | None, out: Tensor
    ) -> None:
        """dL/dx, 0 at the label, (n, last - first), from what was kept or the products again."""

    @abstractmethod
    def set_labels(self, first: int, label_gains: Tensor, out: Tensor) -> None:
        """The labels' own entries of the gradient of a tile."""

    @abstractmethod
    def add_product(self, sums: Tensor, a: Tensor, b: Tensor) -> None:
        """sums += a @ b."""

    @abstractmethod
    def add_rows(
        self, sums: Tensor, source: Tensor, index: Tensor, gain: Tensor, factor: Tensor | None
    ) -> None:
        """sums[r] = factor[r] sums[r] + gain[r] source[index[r]]."""

    @staticmethod
    @abstractmethod
    def scatter(sums: Tensor, gain: Tensor | None, index: Tensor | None, out: Tensor) -> None:
        """out[index[r]] = gain[r] sums[r], rounded once."""
