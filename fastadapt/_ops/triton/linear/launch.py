"""Launches of a linear head's row work for CUDA tensors. Nothing here synchronises."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastadapt._ops.linear.tiles import Gains
from fastadapt._ops.triton.linear import kernels as linear

# 8 warps for a row of a tile have hardly the registers
BY_TILE: dict[str, int | bool] = {"num_warps": 16, "enable_fp_fusion": False}
BY_ROW: dict[str, int | bool] = {"num_warps": 4, "enable_fp_fusion": False}
ROW_BLOCK = 1024  # numbers of a row of hidden states at a time
LABEL_BLOCK = 256  # labels of a program


class Rows(NamedTuple):
    """Products of some rows with a tile of the head, and how to make logits of them."""

    products: Tensor  # (n, width), contiguous rows of any stride
    first: int
    labels: Tensor  # (n, K)
    bias: Tensor | None  # (V,)
    numbers: Tensor  # (2,) float64: the scale, the softcap
    capped: bool
    marked: bool = False  # whether products of labels are -inf; K > 1 asks for it


def _tile(rows: Rows) -> linear.Tile:
    """Bundles a tile for a kernel."""
    x = rows.products
    bias = x if rows.bias is None else rows.bias  # not read where there is none
    return linear.Tile(x, x.stride(0), rows.first, x.shape[1], rows.labels, bias, rows.numbers)


def _kind(rows: Rows, *, moments: bool, exps: bool = False, keep: bool = False) -> linear.Kind:
    """Returns the compile-time constants of a tile."""
    values = (
        rows.bias is not None,
        rows.capped,
        moments,
        rows.marked,
        exps,
        keep,
        rows.products.dtype == torch.float64,
        triton.next_power_of_2(rows.products.shape[1]),
    )
    return linear.Kind(*(tl.constexpr(value) for value in values))


def sum_tile(
    rows: Rows,
    stats: Tensor,
    *,
    moments: bool,
    mass: tuple[Tensor, Tensor, Tensor] | None = None,
    kept: Tensor | None = None,
) -> None:
    """Adds a tile to the statistics; `mass` is a frozen head's sums, exponentials, and shrinks."""
    n, x = rows.products.shape[0], rows.products
    if n == 0:
        return
    sums, exps, shrinks = (x, x, stats) if mass is None else mass
    linear.tile_sum_kernel[(n,)](
        _tile(rows),
        stats,
        linear.Mass(sums, sums.shape[1], exps, shrinks),
        x if kept is None else kept,
        0 if kept is None else kept.stride(0),
        _kind(rows, moments=moments, exps=mass is not None, keep=kept is not None),
        **BY_TILE,
    )


def gradient_tile(rows: Rows, stats: Tensor, gains: Gains, out: Tensor) -> None:
    """Computes the gradient of a tile's products."""
    n = rows.products.shape[0]
    if n == 0:
        return
    linear.tile_gradient_kernel[(n,)](
        _tile(rows),
        stats,
        gains.abc,
        out,
        out.stride(0),
        _kind(rows, moments=gains.moments),
        **BY_TILE,
    )


def set_labels(labels: Tensor, gains: Tensor | None, first: int, out: Tensor) -> None:
    """Writes the labels' own entries of a tile's gradient, or -inf where there are no gains."""
    width = out.shape[1]
    entries, number = labels.numel(), labels.shape[1]
    if entries == 0:
        return
    linear.label_entry_kernel[(triton.cdiv(entries, LABEL_BLOCK),)](
        labels,
        labels if gains is None else gains,
        entries,
        number,
        first,
        out,
        out.stride(0),
        width,
        MARK=gains is None,
        BLOCK=LABEL_BLOCK,
        **BY_ROW,
    )


def mix(
    sums: Tensor,
    out: Tensor,
    *,
    factors: Tensor | None = None,
    source: tuple[Tensor, Tensor, Tensor] | None = None,
    places: Tensor | None = None,
) -> None:
    """out[places[r]] = factors[r] sums[r] + gains[r] source[index[r]], of `source` in this order:

    gains, source, index; gains and index (n, K), of which the sum is taken. Rows of `source` are
    contiguous.
    """
    n, h = sums.shape
    if n == 0:
        return
    gains, rows, index = (sums, sums, sums) if source is None else source
    block = min(ROW_BLOCK, triton.next_power_of_2(h))
    flags = factors is not None, source is not None, places is not None
    constants = (*flags, out.data_ptr() == sums.data_ptr(), block)
    linear.mix_kernel[(n, triton.cdiv(h, block))](
        sums,
        h,
        sums if factors is None else factors,
        rows,
        rows.stride(0),
        index,
        gains,
        index.shape[1],
        sums if places is None else places,
        out,
        linear.Mix(*(tl.constexpr(value) for value in constants)),
        **BY_ROW,
    )


def dot(a: Tensor, b: Tensor, index: Tensor, out: Tensor) -> None:
    """Computes out[r, k] = a[r] b[index[r, k]] in float64."""
    h = a.shape[1]
    if index.numel() == 0:
        return
    linear.dot_kernel[(index.numel(),)](
        a,
        a.stride(0),
        b,
        b.stride(0),
        index,
        index.shape[1],
        h,
        out,
        DOUBLE=a.dtype == torch.float64,
        BLOCK=min(ROW_BLOCK, triton.next_power_of_2(h)),
        **BY_ROW,
    )
