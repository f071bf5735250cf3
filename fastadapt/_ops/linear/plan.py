"""Which plan a linear head gets, by what is request of it: gradients, a budget, a device."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt._ops.linear.cpu import CpuWork
from fastadapt._ops.linear.cuda import CudaWork, DoubleCudaWork
from fastadapt._ops.linear.driver import FORWARD_ONLY, FROZEN_HEAD, RECOMPUTE, kept_ids
from fastadapt._ops.linear.tiles import RowWork
from fastadapt._ops.outputs import wide_dtype

KEPT_BYTES = 1 << 27  # logits kept for the backward where no budget is given and all fit


class LinearPlan(NamedTuple):
    """What `linear_log_odds` will do; another plan has the same results beyond rounding.

    Attributes:
        name: "forward only"; "recompute", "partly grouped" and "grouped", which make none, some or
            all products again in the backward; "frozen head".
        products: of N * H * V, forward and backward together; fewer where rows are ignored.
        kept_bytes: logits, or Jacobian rows of a frozen head, from the forward to the backward.
        peak_bytes: the most that is held over inputs and returned gradients, with no row ignored
            and but for what is a few numbers a row.
    """

    name: str
    products: float
    kept_bytes: int
    peak_bytes: int


def plan_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, memory_budget: int | None = None
) -> LinearPlan:
    """Returns the plan of `linear_log_odds` for these arguments, where gradients are wanted.

    Args:
        hidden (Tensor): (..., H), as for `linear_log_odds`; only shape, dtype, device and
            whether a gradient is wanted matter, of the others too.
        weight (Tensor): (V, H), with a group this rank's slice.
        bias (Tensor | None): (V,).
        memory_budget (int | None): bytes.
    """
    h, v = hidden.shape[-1], weight.shape[0]
    n = hidden.numel() // h
    itemsize = max(hidden.element_size(), weight.element_size())
    work = work_of(hidden)
    forward, backward = work.scratch_bytes(n, v, itemsize)
    wide = wide_dtype(weight.dtype).itemsize
    number = number_of(hidden, weight, bias)
    if number == FORWARD_ONLY:
        return LinearPlan("forward only", 1.0, 0, forward)
    if number == FROZEN_HEAD:
        rows = n * h * wide
        forward += work.exps_bytes(n, v, itemsize)
        return LinearPlan("frozen head", 2.0, rows, rows + forward)
    ids = kept_ids(n, v, itemsize, work.tile, kept_bytes(n * v * itemsize, memory_budget))
    kept = n * ids * itemsize
    sums = n * h * wide if hidden.requires_grad and itemsize < wide else 0
    name = "grouped" if ids == v else "partly grouped" if ids else "recompute"
    wanted = hidden.requires_grad + weight.requires_grad  # a bias costs no product
    again = 1 - ids / v if v else 0.0
    return LinearPlan(name, 1 + wanted + again, kept, kept + max(forward, sums + backward))


def work_of(hidden: Tensor) -> type[RowWork]:
    """The row work of a device."""
    if not hidden.is_cuda:
        return CpuWork
    return DoubleCudaWork if hidden.dtype == torch.float64 else CudaWork


def number_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """The operator's plan: what the backward will want."""
    if not torch.is_grad_enabled():
        return FORWARD_ONLY
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return RECOMPUTE
    return FROZEN_HEAD if hidden.requires_grad else FORWARD_ONLY


def kept_bytes(logits: int, memory_budget: int | None) -> int:
    """Of the bytes of all logits: all or none where the budget is left to us."""
    if memory_budget is not None:
        return memory_budget
    return KEPT_BYTES if logits <= KEPT_BYTES else 0
