"""Tiles of two heads on CUDA: products by cuBLAS in float32, everything between them in Triton."""

from typing import Any

import torch
from torch import Tensor

from fastadapt._ops.linear.cuda import DOUBLE_TILE, CudaWork, backward_tile
from fastadapt._ops.linear.pairs import PairProblem, PairWork
from fastadapt._ops.linear.tiles import Head


class CudaSide(CudaWork):
    """One of the two heads."""

    def blocks(self) -> list[tuple[int, int]]:
        """Returns the first and the last row (exclusive) of each block."""
        return self._blocks()

    def tile_of(self, begin: int, end: int, first: int, last: int) -> Any:
        """Makes the products of a block of rows, and bundles them for a launch."""
        from fastadapt._ops.triton.divergence import launch

        head = self.head
        products = self._products(begin, end, first, last, self.rows)
        return launch.Side(products, first, head.bias, self._numbers, head.softcap != 0)


class DoubleCudaSide(CudaSide):
    """One of two heads of float64."""

    tile = DOUBLE_TILE


class CudaPair(PairWork):
    """Tiles on CUDA, by blocks of rows; JSD's second pass makes the products again.

    To keep them would take a gigabyte for a block of 1024 rows of 128,256 ids.
    """

    side: type[CudaSide] = CudaSide
    tile = CudaSide.tile

    def __init__(self, student: Head, teacher: Head, problem: PairProblem) -> None:
        """Checks the version of torch."""
        self.student: CudaSide = self.side(student)
        self._teacher = self.side(teacher)
        self._kind = problem.kind
        # filled on the device, as the numbers of a head are
        self._beta = student.hidden.new_full((1,), problem.beta, dtype=torch.float64)

    @classmethod
    def mixture_rows(cls, n: int, v: int, itemsize: int) -> int:
        """Returns all rows."""
        return n

    @classmethod
    def makes_again(cls) -> bool:
        """It does."""
        return True

    @classmethod
    def scratch_bytes(cls, n: int, v: int, itemsize: int, kind: int) -> tuple[int, int]:
        """Returns the bytes of two blocks of products; in the backward, of a gradient too."""
        width = min(backward_tile(n, itemsize), cls.tile, v)
        block = 2 * cls.side.rows * max(itemsize, 4)
        return block * min(cls.tile, v), block * width + n * width * itemsize

    def sum_tile(
        self, first: int, last: int, rows: slice, stats: Tensor, *, mixing: bool = False
    ) -> None:
        """Adds a tile to the statistics, block by block of rows, which are all of them."""
        from fastadapt._ops.triton.divergence import launch

        for begin, end in self.student.blocks():
            pair = self._pair(begin, end, first, last)
            launch.sum_tile(pair, stats[begin:end], mixing=mixing)

    def gradient_tile(
        self, first: int, last: int, stats: Tensor, gains: Tensor, out: Tensor
    ) -> None:
        """Computes a tile's gradient, block by block of rows."""
        from fastadapt._ops.triton.divergence import launch

        for begin, end in self.student.blocks():
            pair = self._pair(begin, end, first, last)
            launch.gradient_tile(pair, stats[begin:end], gains[begin:end], out[begin:end])

    def _pair(self, begin: int, end: int, first: int, last: int) -> Any:
        """Makes both products of a block of rows."""
        from fastadapt._ops.triton.divergence import launch

        block = begin, end, first, last
        student, teacher = self.student.tile_of(*block), self._teacher.tile_of(*block)
        return launch.Pair(student, teacher, self._kind, self._beta)


class DoubleCudaPair(CudaPair):
    """Tiles on CUDA for float64."""

    side = DoubleCudaSide
    tile = DoubleCudaSide.tile
