"""Launches of two heads' row work for CUDA tensors. Nothing here synchronises."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastadapt._ops.triton import linear
from fastadapt._ops.triton.divergence import kernels
from fastadapt._ops.triton.launch_linear import BY_TILE


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


def _kind(side: Side) -> linear.Kind:
    """Returns the compile-time constants of a tile."""
    x = side.products
    values = (
        *(side.bias is not None, side.capped, False, False, False),
        *(x.dtype == torch.float64, triton.next_power_of_2(x.shape[1])),
    )
    return linear.Kind(*(tl.constexpr(value) for value in values))


def _sides(pair: Pair) -> kernels.Sides:
    """Bundles both tiles."""
    student, teacher = pair.student, pair.teacher
    return kernels.Sides(_tile(student), _tile(teacher), _kind(student), _kind(teacher), pair.beta)


def sum_tile(pair: Pair, stats: Tensor, *, mixing: bool) -> None:
    """Adds a tile to the statistics; `mixing` is the second pass of JSD."""
    n = stats.shape[0]
    if n == 0:
        return
    if mixing:
        kernels.pair_mixing_kernel[(n,)](_sides(pair), stats, **BY_TILE)
    else:
        kernels.pair_sum_kernel[(n,)](_sides(pair), stats, KIND=pair.kind, **BY_TILE)


def gradient_tile(pair: Pair, stats: Tensor, gains: Tensor, out: Tensor) -> None:
    """Computes the gradient of a tile of the student's products."""
    n = out.shape[0]
    if n == 0:
        return
    kernels.pair_gradient_kernel[(n,)](
        _sides(pair), stats, gains, out, out.stride(0), KIND=pair.kind, **BY_TILE
    )
