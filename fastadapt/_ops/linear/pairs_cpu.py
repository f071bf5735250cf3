"""Tiles of two heads on the CPU: products by torch, everything between them in C++."""

from typing import Any

import torch
from torch import Tensor

from fastadapt import _C
from fastadapt._ops.common import rows_of
from fastadapt._ops.linear.cpu import TILE, CpuWork
from fastadapt._ops.linear.pairs import PairProblem, PairWork
from fastadapt._ops.linear.tiles import Head

MIXTURE_BYTES = 1 << 27  # of both logits of the rows that JSD's two passes take at once
LEAST_ROWS = 64  # of them; products of fewer would mostly read the heads


class CpuPair(PairWork):
    """Tiles on the CPU, with products in the dtype of the inputs."""

    tile = TILE

    def __init__(self, student: Head, teacher: Head, problem: PairProblem) -> None:
        self.student = CpuWork(student)
        self._sides = self.student, CpuWork(teacher)
        self._problem = problem
        self._buffers: list[Tensor] = []

    @classmethod
    def mixture_rows(cls, n: int, v: int, itemsize: int) -> int:
        """Returns the rows of equal blocks whose logits fit 128 MiB, or of 64 rows."""
        most = max(LEAST_ROWS, MIXTURE_BYTES // (2 * v * itemsize))
        blocks = max(1, -(-n // most))
        return -(-n // blocks)

    @classmethod
    def makes_again(cls) -> bool:
        """The logits of a block of rows are kept."""
        return False

    @classmethod
    def scratch_bytes(cls, n: int, v: int, itemsize: int, kind: int) -> tuple[int, int]:
        """Returns the bytes of one tile of both heads, or of the logits that JSD keeps."""
        tile = 2 * n * min(cls.tile, v) * itemsize
        if kind != _C.JSD:
            return tile, tile
        return 2 * cls.mixture_rows(n, v, itemsize) * v * itemsize, tile

    def sum_tile(
        self, first: int, last: int, rows: slice, stats: Tensor, *, mixing: bool = False
    ) -> None:
        """Adds a tile to the statistics, of products that only JSD's first pass keeps."""
        student, teacher = (self._slot(i, first, last, rows) for i in range(2))
        if not mixing:
            for side, out in zip(self._sides, (student, teacher), strict=True):
                side.products(first, last, rows, out)
        _C.pair_sum(
            **self._tile(student, teacher, first, stats),
            mixing=mixing,
            num_threads=torch.get_num_threads(),
        )

    def gradient_tile(
        self, first: int, last: int, stats: Tensor, gains: Tensor, out: Tensor
    ) -> None:
        """Computes a tile's gradient, in the buffer that held the student's products."""
        rows = slice(0, out.shape[0])
        if not self._buffers:  # the first tile is as wide as any
            self._buffers = [out.new_empty(out.numel())]
        teacher = self._buffers[0][: out.numel()].view(out.shape)
        for side, products in zip(self._sides, (out, teacher), strict=True):
            side.products(first, last, rows, products)
        _C.pair_backward(
            **self._tile(out, teacher, first, stats),
            gains=gains,
            out=out,
            num_threads=torch.get_num_threads(),
        )

    def _slot(self, which: int, first: int, last: int, rows: slice) -> Tensor:
        """Returns where the products of a tile go: for JSD each tile has a place of its own."""
        n, v, hidden = rows.stop - rows.start, self._problem.weight.shape[0], self._problem.hidden
        keeps = self._problem.kind == _C.JSD
        if not self._buffers:  # the first block of rows has as many as any
            size = n * (v if keeps else min(self.tile, v))
            self._buffers = [hidden.new_empty(size) for _ in range(2)]
        begin = n * first if keeps else 0
        place = self._buffers[which][begin : begin + n * (last - first)]
        return place.view(n, last - first)

    def _tile(self, student: Tensor, teacher: Tensor, first: int, stats: Tensor) -> dict[str, Any]:
        """What the kernels need to know of a tile of products."""
        head, of_teacher = heads = [side.head for side in self._sides]
        biases = [None if x.bias is None else x.bias[first:] for x in heads]
        problem = self._problem
        return {
            "rows": rows_of(student),
            "bias": biases[0],
            "scale": head.scale,
            "cap": head.softcap,
            "teacher": teacher,
            "teacher_stride": teacher.stride(0),
            "teacher_bias": biases[1],
            "teacher_scale": of_teacher.scale,
            "teacher_cap": of_teacher.softcap,
            "kind": problem.kind,
            "beta": problem.beta,
            "stats": stats,
        }
