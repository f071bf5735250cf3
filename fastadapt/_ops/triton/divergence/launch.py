"""Launches of two heads' row work for CUDA tensors. Nothing here synchronises."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastadapt._ops.triton.divergence import kernels
from fastadapt._ops.triton.linear import kernels as linear
from fastadapt._ops.triton.linear.launch import BY_TILE

GRADIENT_BLOCK = 4096  # ids of a program; with 8192 that of JSD and a cap spills on sm_80


class Side(NamedTuple):
    """Products of some rows with a tile of one head, and how to make logits of them."""

    products: Tensor  # (n, width), contiguous rows of any stride
    first: int
    bias: Tensor | None  # (V,)
    numbers: Tensor  # (2,) float64: the scale, the softcap
    capped: bool


class Pair(NamedTuple):
    """Both heads' products of the same rows and ids."""

    student: Side
    teacher: Side
    kind: int  # KL, REVERSE_KL or JSD
    beta: Tensor  # (1,) float64


def _tile(side: Side) -> linear.Tile:
    """Bundles a tile for a kernel; what it does not have is not read."""
    x = side.products
    bias = x if side.bias is None else side.bias
    return linear.Tile(x, x.stride(0), side.first, x.shape[1], x, bias, side.numbers)


def _kind(side: Side, block: int) -> linear.Kind:
    """Returns the compile-time constants of a tile, of which a program has a block."""
    double = side.products.dtype == torch.float64
    flags = side.bias is not None, side.capped, *[False] * 4
    values = *flags, double, block
    return linear.Kind(*(tl.constexpr(value) for value in values))


def _sides(pair: Pair, block: int) -> kernels.Sides:
    """Bundles both tiles."""
    student, teacher = pair.student, pair.teacher
    kinds = _kind(student, block), _kind(teacher, block)
    return kernels.Sides(_tile(student), _tile(teacher), *kinds, pair.beta)


def sum_tile(pair: Pair, stats: Tensor, *, mixing: bool) -> None:
    """Adds a tile to the statistics; `mixing` is the second pass of JSD."""
    n = stats.shape[0]
    if n == 0:
        return
    sides = _sides(pair, triton.next_power_of_2(pair.student.products.shape[1]))
    if mixing:
        kernels.pair_mixing_kernel[(n,)](sides, stats, **BY_TILE)
    else:
        kernels.pair_sum_kernel[(n,)](sides, stats, KIND=pair.kind, **BY_TILE)


def gradient_tile(pair: Pair, stats: Tensor, gains: Tensor, out: Tensor) -> None:
    """Computes the gradient of a tile of the student's products."""
    n, width = out.shape
    if n == 0:
        return
    block = min(GRADIENT_BLOCK, triton.next_power_of_2(width))
    kernels.pair_gradient_kernel[(n, triton.cdiv(width, block))](
        _sides(pair, block), stats, gains, out, out.stride(0), KIND=pair.kind, **BY_TILE
    )
