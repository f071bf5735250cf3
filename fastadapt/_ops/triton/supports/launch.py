"""Launches of the products and sums of supports. Nothing here synchronises."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastadapt._ops.triton.supports import kernels

DEPTH = 1024  # entries of a row that a program multiplies at once
WIDTH, AT_ONCE = 256, 8  # of a block that is summed: entries, and rows of the source
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


def dot(hidden: Tensor, weight: Tensor, rows: Tensor, ids: Tensor, out: Tensor) -> None:
    """Computes out[p] = hidden[rows[p]] weight[ids[p]], (count,) float64 of float32 sums."""
    count, h = out.shape[0], hidden.shape[1]
    if count == 0:
        return
    kernels.dot_kernel[(count,)](
        *(hidden, weight, rows, ids, out, hidden.stride(0), weight.stride(0), h),
        BLOCK=min(DEPTH, triton.next_power_of_2(h)),
        WIDE=_wide(weight),
        **OPTIONS,
    )


def mix(
    source: Tensor, gain: Tensor, index: Tensor, offsets: Tensor, places: Tensor, out: Tensor
) -> None:
    """Computes out[places[p]] as the sum of gain[k] source[index[k]] over part p of the list."""
    parts, h = places.shape[0], source.shape[1]
    if parts == 0:
        return
    block = min(WIDTH, triton.next_power_of_2(h))
    kernels.mix_kernel[(parts, triton.cdiv(h, block))](
        *(source, gain, index, offsets, places, out, source.stride(0), h),
        AT_ONCE=AT_ONCE,
        BLOCK=block,
        WIDE=_wide(source),
        **OPTIONS,
    )


def _wide(x: Tensor) -> Any:
    """The type of sums."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32
