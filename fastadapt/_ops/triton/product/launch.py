"""Launches of a head's product with its sums. Nothing here synchronises."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastadapt._ops.triton.linear.launch import BY_ROW
from fastadapt._ops.triton.product import kernels

ROWS, IDS, DEPTH = 128, 128, 64  # of a block: 64 KiB of accumulators, 32 KiB of operands a stage
# Two programs fit a multiprocessor, so that one sums while the other multiplies; 256 ids a block
# would be one program, and spill in its sums.
PROGRAMS = 2
BY_BLOCK: dict[str, int | bool] = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": False}
ALIGNED = 8  # numbers of half precision, the 16 bytes of a descriptor's strides and addresses


class Sides(NamedTuple):
    """The operands, and what makes logits of their product."""

    hidden: Tensor  # (n, H)
    weight: Tensor  # (width, H), a tile of the head
    labels: Tensor  # (n, K)
    bias: Tensor | None  # (V,), float32
    numbers: Tensor  # (2,) float64: the scale, the softcap
    capped: bool


def is_aligned(x: Tensor) -> bool:
    """Whether a matrix of half precision can be read through a descriptor."""
    rows = x.stride(1) == 1 and x.stride(0) % ALIGNED == 0 and x.stride(0) >= x.shape[1]
    return rows and x.data_ptr() % 16 == 0


def add_sums(
    sides: Sides,
    first: int,
    stats: Tensor,
    *,
    moments: bool,
    kept: Tensor | None = None,
) -> None:
    """Adds the ids from `first` on to the statistics; writes their products, rounded, if asked."""
    hidden, weight = sides.hidden, sides.weight
    (n, h), width = hidden.shape, weight.shape[0]
    if n == 0 or width == 0:
        return
    parts = hidden.new_empty(triton.cdiv(width, IDS), n, kernels.PARTS.value, dtype=torch.float32)
    flags = sides.bias is not None, sides.capped, moments, kept is not None, ROWS, IDS, DEPTH
    programs = PROGRAMS * _multiprocessors(hidden)
    labels = sides.labels
    kernels.product_sum_kernel[(min(programs, triton.cdiv(n, ROWS) * parts.shape[0]),)](
        TensorDescriptor.from_tensor(hidden, [ROWS, DEPTH]),
        TensorDescriptor.from_tensor(weight, [IDS, DEPTH]),
        kernels.Head(
            width,
            first,
            labels,
            labels.shape[1],
            labels if sides.bias is None else sides.bias,  # not read where there is none
            sides.numbers,
        ),
        parts,
        parts if kept is None else kept,
        0 if kept is None else kept.stride(0),
        n,
        h,
        kernels.Kind(*(tl.constexpr(flag) for flag in flags)),
        **BY_BLOCK,
    )
    kernels.add_parts_kernel[(n,)](
        parts,
        parts.shape[0],
        n,
        stats,
        MOMENTS=moments,
        BLOCK=triton.next_power_of_2(parts.shape[0]),
        **BY_ROW,
    )


def _multiprocessors(x: Tensor) -> int:
    """Returns those of a tensor's device; 1 for the interpreter, which runs one after another."""
    if not x.is_cuda:
        return 1
    return torch.cuda.get_device_properties(x.device).multi_processor_count
