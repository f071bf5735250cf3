"""A linear head's tiles on the CPU: products by torch, everything between them in C++."""

import torch
from torch import Tensor

from fastadapt import _C
from fastadapt._ops.common import DTYPE_CODES, rows_of
from fastadapt._ops.linear.tiles import (
    Gains,
    Head,
    RowWork,
    TileRequest,
    contiguous_rows,
    label_blocks,
)

TILE = 2048  # ids a tile; csrc/kernels.h: at most 4096
ROWS = 64  # that read a head from memory once
_PRODUCT_ELEMENTS = 1 << 20  # of a bfloat16 product that is added to float32 sums


class CpuWork(RowWork):
    """Tiles on the CPU, with products in the dtype of the inputs."""

    tile = TILE
    rows = ROWS
    wide_numbers = _PRODUCT_ELEMENTS

    def __init__(self, head: Head) -> None:
        super().__init__(head)
        self._buffer: Tensor | None = None
        self._shrinks = head.hidden.new_empty(head.hidden.shape[0], dtype=torch.float64)

    @classmethod
    def scratch_bytes(cls, n: int, v: int, itemsize: int) -> tuple[int, int]:
        """Returns the bytes of one tile, for the forward and the backward."""
        tile = n * min(cls.tile, v) * itemsize
        return tile, tile

    def label_products(self) -> Tensor:
        """Computes the labels' products as float32 dot products."""
        head = self.head
        out = head.hidden.new_zeros(head.labels.shape, dtype=torch.float64)
        if head.weight.shape[0] == 0:
            return out
        for rows, source, index in label_blocks(head.weight, head.label_rows, head.hidden.dtype):
            dot(head.hidden[rows], source, index, out[rows])
        if head.low is not None:
            share = torch.empty_like(out)
            dot(*head.low, head.label_rows, share)
            out += share
        return out

    def sum_tile(self, first: int, last: int, stats: Tensor, request: TileRequest) -> None:
        """Adds a tile to the statistics; for a frozen head exponentials replace the products."""
        tile = self._tile_of_products(first, last, request.kept)
        _C.tile(
            **self._tile(tile, first),
            moments=request.moments,
            stats=stats,
            exps=None if request.sums is None else tile,
            shrinks=self._shrinks,
            num_threads=torch.get_num_threads(),
        )
        if request.sums is not None:
            self.add_product(request.sums, tile, self.ids(first, last), self._shrinks)
        if request.low_sums is not None and self.head.low is not None:
            request.low_sums.mul_(self._shrinks[:, None].to(request.low_sums.dtype))
            self.add_low_product(request.low_sums, tile, self.head.low.weight[first:last])

    def gradient_tile(
        self, first: int, last: int, stats: Tensor, gains: Gains, kept: Tensor | None, out: Tensor
    ) -> None:
        """Computes a tile's gradient, in the buffer that held its products."""
        tile = self._tile_of_products(first, last, out) if kept is None else kept
        _C.tile_backward(
            **self._tile(tile, first),
            moments=gains.moments,
            stats=stats,
            gains=gains.abc,
            out=out,
            num_threads=torch.get_num_threads(),
        )

    def set_labels(self, first: int, label_gains: Tensor, out: Tensor) -> None:
        """Writes the labels' own entries of a tile's gradient."""
        place = self.head.labels - first
        row, k = ((place >= 0) & (place < out.shape[1])).nonzero(as_tuple=True)
        out[row, place[row, k]] = label_gains[row, k].to(out.dtype)

    def add_product(self, sums: Tensor, a: Tensor, b: Tensor, factor: Tensor | None = None) -> None:
        """Computes sums = factor sums + a @ b; half precision is rounded once per block of rows."""
        if sums.dtype == a.dtype:
            if factor is not None:
                sums.mul_(factor[:, None].to(sums.dtype))
            torch.addmm(sums, a, b, out=sums)
            return
        n, h = sums.shape
        block = max(1, min(n, _PRODUCT_ELEMENTS // h))
        out = a.new_empty(block, h)
        for r in range(0, n, block):
            rows = slice(r, min(r + block, n))
            product = torch.mm(a[rows], b, out=out[: rows.stop - r])
            mix(sums[rows], product, factor=None if factor is None else factor[rows])

    @staticmethod
    def add_rows(
        sums: Tensor, source: Tensor, index: Tensor, gain: Tensor, factor: Tensor | None
    ) -> None:
        """Adds scaled source rows to the sums, without rounding the source."""
        source, index = contiguous_rows(source, index)
        mix(sums, source, factor=factor, gain=gain, index=index)

    @staticmethod
    def scatter(sums: Tensor, gain: Tensor | None, index: Tensor | None, out: Tensor) -> None:
        """Writes scaled sums to their rows of `out`."""
        n, h = sums.shape
        _C.scatter(
            dtype=DTYPE_CODES[out.dtype],
            n=n,
            h=h,
            src=sums,
            gain=gain,
            index=index,
            out=out,
            num_threads=torch.get_num_threads(),
        )

    def _tile(self, x: Tensor, first: int) -> "_C.Tile":
        """What the kernels need to know of a tile of products."""
        head = self.head
        return {
            "rows": rows_of(x),
            "first": first,
            "k": head.labels.shape[1],
            "labels": head.labels,
            "bias": None if head.bias is None else head.bias[first:],
            "scale": head.scale,
            "cap": head.softcap,
        }

    def products(self, first: int, last: int, rows: slice, out: Tensor) -> Tensor:
        """Computes hidden @ weight.T of some rows over a tile, added to an adapter's product."""
        head, weight = self.head, self.ids(first, last).t()
        if head.low is None:
            return torch.mm(head.hidden[rows], weight, out=out)
        # the smaller one first: in half precision it is rounded, and their sum once more
        _write_product(out, head.low.states[rows], head.low.weight[first:last].t())
        return torch.addmm(out, head.hidden[rows], weight, out=out)

    def _tile_of_products(self, first: int, last: int, out: Tensor | None) -> Tensor:
        """Returns the products of all rows over a tile, in a buffer where no place is given."""
        n, v = self.head.hidden.shape[0], self.head.weight.shape[0]
        if out is None:
            if self._buffer is None:
                self._buffer = self.head.hidden.new_empty(n * min(self.tile, v))
            out = self._buffer[: n * (last - first)].view(n, last - first)
        return self.products(first, last, slice(n), out)


def _write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Computes out = a @ b; in half precision it is rounded once, by blocks of rows."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
        return
    block = max(1, _PRODUCT_ELEMENTS // out.shape[1])
    for begin in range(0, out.shape[0], block):
        rows = slice(begin, begin + block)
        out[rows] = a[rows] @ b


def dot(a: Tensor, b: Tensor, index: Tensor, out: Tensor, *, offsets: Tensor | None = None) -> None:
    """Computes out[r, k] = a[r] b[index[r, k]] in float64 of float32 sums.

    With offsets (n + 1,), index and out are the compressed rows' lists, and the entries of a row of
    `b` are contiguous.
    """
    if offsets is None:
        b, index = contiguous_rows(b, index)
    _C.dot(
        dtype=DTYPE_CODES[b.dtype],
        n=a.shape[0],
        h=a.shape[1],
        k=1 if offsets is not None else index.shape[1],
        offsets=offsets,
        a=a,
        a_stride=a.stride(0),
        b=b,
        b_stride=b.stride(0),
        index=index,
        out=out,
        num_threads=torch.get_num_threads(),
    )


def mix(
    sums: Tensor,
    source: Tensor,
    *,
    factor: Tensor | None = None,
    gain: Tensor | None = None,
    index: Tensor | None = None,
    offsets: Tensor | None = None,
) -> None:
    """Computes sums[r] = factor[r] sums[r] + gain[r] source[index[r]] on contiguous rows.

    With (n, K) gains and indices the sum over K; with offsets (n + 1,) those are lists, of which a
    row has its part; without indices, source[r]. What a row is made of is added in its order.
    """
    n, h = sums.shape
    _C.mix(
        dtype=DTYPE_CODES[source.dtype],
        n=n,
        h=h,
        k=1 if index is None or offsets is not None else index.shape[1],
        offsets=offsets,
        dst=sums,
        factor=factor,
        gain=gain,
        index=index,
        src=source,
        src_stride=source.stride(0),
        num_threads=torch.get_num_threads(),
    )
