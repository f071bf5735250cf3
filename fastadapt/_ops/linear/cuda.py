"""A linear head's tiles on CUDA: products by cuBLAS, everything between them in Triton.

Products are float32 (float64 of float64), so that logits are never rounded before their
log-sum-exp, and made in blocks of 1024 rows, the last one filled up with zeros, by tiles of 8192
ids: they stay in or near the L2 cache, and their shape, by which cuBLAS chooses its kernel, is the
same for any number of rows. Few are filled up to 512 rows where that is lost in any case: with a
frozen head, and where gradients make the products again that the forward made in its own way.

Where that is predicted to be faster, from sm_90 on, logits of half precision are summed within a
product of our own, `triton.product`, and no product is written. A frozen head's are not, whose
exponentials a second product reads, and no backward's.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from fastadapt._ops.linear.cpu import CpuWork
from fastadapt._ops.linear.tiles import (
    Gains,
    Head,
    RowWork,
    TileRequest,
    contiguous_rows,
    label_blocks,
)

TILE = 8192  # ids a tile
DOUBLE_TILE = 2048  # of float64, as many as a program has registers for
ROWS = 1024  # of a product: with a tile of ids 32 MiB of float32; half as many of few rows, which
# with a tile are 128 blocks of 128 x 256, one for each of an H100's 132 multiprocessors
MASS_BLOCKS = 4  # of so many rows in a frozen head's second product
GRADIENT_BYTES = 128 << 20  # of one tile's gradient, where there are so many rows
LEAST_TILE = 1024
# Our product has 600 TFLOP/s where cuBLAS has 700, but what that writes is read again, 8 bytes a
# logit at 4 TB/s: equal at 2 H (1 / 600 - 1 / 700) = 2, H = 4200. Few rows are filled up there.
PRODUCT_WIDTH, PRODUCT_ROWS = 4096, 512
PRODUCT_LABELS = 8  # of a row; each is looked for in every block
HOPPER = 90


def backward_tile(n: int, itemsize: int) -> int:
    """Returns the ids per tile in the backward, a power of two; fewer for many rows."""
    width = TILE
    while width > LEAST_TILE and n * width * itemsize > GRADIENT_BYTES:
        width //= 2
    return width


class CudaWork(RowWork):
    """Tiles on CUDA, with float32 products by blocks of rows."""

    tile = TILE
    rows = ROWS
    wide_numbers = ROWS * TILE

    def __init__(self, head: Head) -> None:
        """Checks the version of torch; buffers are allocated when they are needed."""
        super().__init__(head)
        hidden = head.hidden
        if hidden.element_size() == 2 and not _has_wide_products():
            raise RuntimeError(
                "torch: expected 2.8 or later for a linear head of half precision on CUDA, "
                f"got {torch.__version__}"
            )
        self._wide = torch.promote_types(hidden.dtype, torch.float32)
        self._block: Tensor | None = None
        # filled on the device: a tensor made from numbers would be copied there, and waited for
        numbers = (head.scale, head.softcap or 1.0)
        self._numbers = torch.cat(
            [hidden.new_full((1,), number, dtype=torch.float64) for number in numbers]
        )
        self._last: Tensor | None = None  # of the blocks of rows, filled up
        self._low_states: Tensor | None = None  # of an adapter, whose blocks are all filled up
        if head.low is not None:
            states, missing = head.low.states, -hidden.shape[0] % self.rows
            self._low_states = torch.nn.functional.pad(states, (0, 0, 0, missing))
        self._exps: Tensor | None = None

    @cached_property
    def _sums_in_products(self) -> bool:
        """Whether our own product can read this head, and is predicted to be faster."""
        hidden, weight = self.head.hidden, self.head.weight
        n, h = hidden.shape
        plain = hidden.element_size() == 2 and self.head.low is None
        if not plain or n == 0 or weight.shape[0] == 0:
            return False
        if capability_of(hidden) < HOPPER or self.head.labels.shape[1] > PRODUCT_LABELS:
            return False
        from fastadapt._ops.triton.product import launch

        read = [hidden, weight][: 1 + (weight.dtype == hidden.dtype)]  # else a tile is cast
        readable = h % launch.DEPTH == 0 and all(map(launch.is_aligned, read))
        return readable and (h < PRODUCT_WIDTH or n <= PRODUCT_ROWS)

    @property
    def _least(self) -> int:
        """The rows to which a block is filled up at least: half as many of few."""
        few = self.rows // 2
        return few if self.head.hidden.shape[0] <= few else self.rows

    def backward_tile(self) -> int:
        """Returns the ids per tile that keep a tile's gradient within 128 MiB."""
        hidden = self.head.hidden
        return min(self.tile, backward_tile(hidden.shape[0], hidden.element_size()))

    @classmethod
    def scratch_bytes(cls, n: int, v: int, itemsize: int) -> tuple[int, int]:
        """Returns the bytes of a block of products; in the backward, of a tile's gradient too."""
        block = cls.rows * min(cls.tile, v) * max(itemsize, 4)
        width = min(backward_tile(n, itemsize), cls.tile, v)
        return block, cls.rows * width * max(itemsize, 4) + n * width * itemsize

    @classmethod
    def exps_bytes(cls, n: int, v: int, itemsize: int) -> int:
        """Returns the bytes of the exponentials of as many blocks as a second product has."""
        return min(n, cls.rows * MASS_BLOCKS) * min(cls.tile, v) * itemsize

    def label_products(self) -> Tensor:
        """Computes the labels' products as float32 dot products, float64 across blocks."""
        from fastadapt._ops.triton.linear import launch as launch_linear

        head, hidden = self.head, self.head.hidden
        out = hidden.new_zeros(head.labels.shape, dtype=torch.float64)
        if head.weight.shape[0] > 0:
            for rows, source, index in label_blocks(head.weight, head.label_rows, hidden.dtype):
                launch_linear.dot(hidden[rows], *contiguous_rows(source, index), out[rows])
        if head.weight.shape[0] > 0 and head.low is not None:
            share = torch.empty_like(out)
            launch_linear.dot(*head.low, head.label_rows, share)
            out += share
        return out

    def sum_tile(self, first: int, last: int, stats: Tensor, request: TileRequest) -> None:
        """Adds a tile to the statistics; a frozen head's exponentials are rounded to its dtype."""
        from fastadapt._ops.triton.linear import launch as launch_linear

        if request.sums is None and self._sums_in_products:
            self._add_sums_of_products(first, last, stats, request)
            return
        if request.sums is not None:
            self._add_mass(first, last, stats, request)
            return
        for begin, end in self._blocks():
            part = slice(begin, end)
            launch_linear.sum_tile(
                self._rows(self._products(begin, end, first, last, self.rows), part, first),
                stats[part],
                moments=request.moments,
                kept=None if request.kept is None else request.kept[part],
            )

    def _add_mass(self, first: int, last: int, stats: Tensor, request: TileRequest) -> None:
        """Adds a tile to the statistics and to a frozen head's sums, whose product has more rows.

        Of H <= 2048 and one block of rows it would have fewer programs than a GPU has
        multiprocessors.
        """
        from fastadapt._ops.triton.linear import launch as launch_linear

        n, width, sums = stats.shape[0], last - first, request.sums
        assert sums is not None
        most = max(1, min(n, self.rows * MASS_BLOCKS))
        if self._exps is None:
            self._exps = self.head.hidden.new_empty(most * width)  # the first tile is the widest
        shrinks = stats.new_empty(n)
        for top in range(0, n, most):
            bottom = min(top + most, n)
            exps = self._exps[: (bottom - top) * width].view(bottom - top, width)
            for begin in range(top, bottom, self.rows):
                part = slice(begin, min(begin + self.rows, bottom))
                products = self._products(begin, part.stop, first, last, self._least)
                rows = self._rows(products, part, first)
                mass = sums[part], exps[begin - top : part.stop - top], shrinks[part]
                launch_linear.sum_tile(rows, stats[part], moments=request.moments, mass=mass)
            part = slice(top, bottom)
            self.add_product(sums[part], exps, self.ids(first, last))
            if request.low_sums is not None and self.head.low is not None:
                low_sums = request.low_sums[part]
                launch_linear.mix(low_sums, low_sums, factors=shrinks[part])
                self.add_low_product(low_sums, exps, self.head.low.weight[first:last])

    def _add_sums_of_products(
        self, first: int, last: int, stats: Tensor, request: TileRequest
    ) -> None:
        """Adds a tile to the statistics within our own product."""
        from fastadapt._ops.triton.linear import launch as launch_linear
        from fastadapt._ops.triton.product import launch

        head, kept = self.head, request.kept
        matrix = head.hidden, self.ids(first, last), head.labels, head.bias
        sides = launch.Sides(*matrix, self._numbers, head.softcap != 0)
        launch.add_sums(sides, first, stats, moments=request.moments, kept=kept)
        if kept is not None and head.labels.shape[1] > 1:
            launch_linear.set_labels(head.labels, None, first, kept)

    def gradient_tile(
        self, first: int, last: int, stats: Tensor, gains: Gains, kept: Tensor | None, out: Tensor
    ) -> None:
        """Computes a tile's gradient, from products made again or from kept logits."""
        from fastadapt._ops.triton.linear import launch as launch_linear

        if kept is not None:
            everything = slice(0, kept.shape[0])
            rows = self._rows(kept, everything, first, kept=True)
            launch_linear.gradient_tile(rows, stats, gains, out)
            return
        height = self._least if self._sums_in_products else self.rows
        for begin, end in self._blocks():
            part = slice(begin, end)
            rows = self._rows(self._products(begin, end, first, last, height), part, first)
            some = Gains(gains.abc[part], gains.moments)
            launch_linear.gradient_tile(rows, stats[part], some, out[part])

    def set_labels(self, first: int, label_gains: Tensor, out: Tensor) -> None:
        """Writes the labels' own entries of a tile's gradient, in one launch."""
        from fastadapt._ops.triton.linear import launch as launch_linear

        launch_linear.set_labels(self.head.labels, label_gains, first, out)

    def add_product(self, sums: Tensor, a: Tensor, b: Tensor) -> None:
        """Adds a product to float32 sums without rounding it."""
        if sums.dtype == a.dtype:
            torch.addmm(sums, a, b, out=sums)
        elif _adds_wide_products():
            torch.addmm(sums, a, b, out_dtype=torch.float32, out=sums)
        else:
            sums += torch.mm(a, b, out_dtype=torch.float32)

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Computes out = a @ b; the product of half precision is float32."""
        if out.dtype == a.dtype:
            torch.mm(a, b, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)

    @staticmethod
    def add_rows(
        sums: Tensor, source: Tensor, index: Tensor, gain: Tensor, factor: Tensor | None
    ) -> None:
        """Adds scaled source rows to the sums in place."""
        from fastadapt._ops.triton.linear import launch as launch_linear

        source, index = contiguous_rows(source, index)
        launch_linear.mix(sums, sums, factors=factor, source=(gain, source, index))

    @staticmethod
    def scatter(sums: Tensor, gain: Tensor | None, index: Tensor | None, out: Tensor) -> None:
        """Writes scaled sums to their rows of `out`, in one pass."""
        from fastadapt._ops.triton.linear import launch as launch_linear

        launch_linear.mix(sums, out, factors=gain, places=index)

    def _blocks(self) -> list[tuple[int, int]]:
        """Returns the first and the last row (exclusive) of each block."""
        n = self.head.hidden.shape[0]
        return [(begin, min(begin + self.rows, n)) for begin in range(0, n, self.rows)]

    def _products(self, begin: int, end: int, first: int, last: int, height: int) -> Tensor:
        """Computes hidden @ weight.T for a block of rows, filled up to a height, one in each call.

        An adapter's product is added to it.
        """
        hidden, weight = self.head.hidden[begin:end], self.ids(first, last)
        if end - begin < height:
            if self._last is None:
                self._last = hidden.new_zeros(height, hidden.shape[1])
                self._last[: end - begin] = hidden
            hidden = self._last
        if self._block is None:  # the first tile is as wide as any
            self._block = hidden.new_empty(height * weight.shape[0], dtype=self._wide)
        out = self._block[: height * weight.shape[0]].view(height, weight.shape[0])
        self.product(hidden, weight.t(), out)
        if self._low_states is not None and self.head.low is not None:
            states = self._low_states[begin : begin + height]
            torch.addmm(out, states, self.head.low.weight[first:last].t(), out=out)
        return out[: end - begin]

    def _rows(self, products: Tensor, part: slice, first: int, kept: bool = False) -> Any:
        """Bundles a block of products for a launch; of several labels a row they are marked."""
        from fastadapt._ops.triton.linear import launch as launch_linear

        head = self.head
        labels, marked = head.labels[part], head.labels.shape[1] > 1
        if marked and not kept:
            launch_linear.set_labels(labels, None, first, products)
        return launch_linear.Rows(
            products, first, labels, head.bias, self._numbers, head.softcap != 0, marked
        )


class DoubleCudaWork(CudaWork):
    """Tiles on CUDA for float64."""

    tile = DOUBLE_TILE


def work_of(hidden: Tensor) -> type[RowWork]:
    """The row work of a device."""
    if not hidden.is_cuda:
        return CpuWork
    return DoubleCudaWork if hidden.dtype == torch.float64 else CudaWork


def capability_of(x: Tensor) -> int:
    """Returns the compute capability of a tensor's device, 90 of 9.0; 0 of a CPU."""
    if not x.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def _has_wide_products() -> bool:
    """Whether this torch multiplies half precision into float32."""
    return "dtype_out" in torch.ops.aten.mm.overloads()


def _adds_wide_products() -> bool:
    """Whether this torch adds such a product to float32 in the same call."""
    return TorchVersion(torch.__version__) >= "2.10"
