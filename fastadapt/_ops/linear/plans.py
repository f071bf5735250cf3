"""Plans of a linear head: what its forward keeps for a backward, and what both hold."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt._ops.checks import autocasts
from fastadapt._ops.linear.cuda import work_of
from fastadapt._ops.linear.driver import FORWARD_ONLY, FROZEN_HEAD, RECOMPUTE, kept_ids
from fastadapt._ops.linear.tiles import CAST_ROWS, Lora, LowRank

MOMENTS = ("entropy", "sum_of_squares")  # outputs that the moments of the others make
SMALL_BYTES = 1 << 27  # of logits: so few are kept whole
# 384 MiB of logits are kept for any trained head: of 4,096 rows of 32k float32 ids three quarters,
# so that 3.25 products are made for 3, with a third of full logits' peak.
KEPT_BYTES = 3 << 27


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
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    memory_budget: int | None = None,
    outputs: Sequence[str] = (),
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> LinearPlan:
    """Returns the plan of `linear_log_odds` for these arguments, where gradients are wanted.

    Args:
        hidden (Tensor): (..., H), as for `linear_log_odds`; only shape, dtype, device and
            whether a gradient is wanted matter, of the others too.
        weight (Tensor): (V, H), with a group this rank's slice.
        bias (Tensor | None): (V,).
        memory_budget (int | None): bytes.
        outputs (Sequence[str]): as for `linear_log_odds`, differentiable: those of `MOMENTS` take
            one more product with a frozen head.
        lora (tuple[Tensor, Tensor, float] | None): (A, B, scale), as for `linear_log_odds`.
    """
    hidden = hidden.reshape(-1, hidden.shape[-1])
    (n, h), v = hidden.shape, weight.shape[0]
    itemsize, work = dtype_of(hidden, weight).itemsize, work_of(hidden)
    held = cast_bytes(hidden, weight)  # throughout
    held += low_bytes(hidden, weight, lora)
    low, r = None, 0
    if lora is not None:
        a, b, _ = lora
        r = a.shape[0]
        states = hidden.new_empty(0, r, requires_grad=hidden.requires_grad or a.requires_grad)
        low = LowRank(states, b)
    one = 1 + r / h  # its products with a column of states and weight for each of H
    number = number_of(hidden, weight, bias, any(name in MOMENTS for name in outputs), low)
    if number != RECOMPUTE:
        forward, _ = work.scratch_bytes(n, v, itemsize)
        if number == FORWARD_ONLY:
            return LinearPlan("forward only", one, 0, held + forward)
        rows = n * (h + r) * torch.promote_types(weight.dtype, torch.float32).itemsize
        forward += work.exps_bytes(n, v, itemsize)
        return LinearPlan("frozen head", 2 * one, rows, held + rows + forward)
    ids = kept_ids(n, v, itemsize, work.tile, kept_bytes(hidden, weight, memory_budget))
    kept = n * ids * itemsize
    name = "grouped" if ids == v else "partly grouped" if ids else "recompute"
    wanted = hidden.requires_grad + weight.requires_grad  # a bias costs no product
    again = 1 - ids / v if v else 0.0
    products = (1 + again) * one + wanted + 2 * r / h
    return LinearPlan(name, products, kept, held + kept + _beside(hidden, weight, r))


def low_rank(rows: Tensor, lora: Lora | None) -> LowRank | None:
    """Makes an adapter's states, float32 or float64, of hidden states (N, H) cast as by peft."""
    if lora is None:
        return None
    a, b, scale = lora
    states = rows if autocasts(rows.device) else rows.to(a.dtype)
    wide = torch.promote_types(rows.dtype, torch.float32)
    return LowRank(torch.nn.functional.linear(states, a).to(wide) * float(scale), b)


def low_bytes(hidden: Tensor, weight: Tensor, lora: Lora | None) -> int:
    """The bytes that an adapter takes: states, what is made wide for it, at once or by blocks."""
    if lora is None:
        return 0
    a, b, _ = lora
    (v, r), h, n = b.shape, a.shape[1], hidden.numel() // hidden.shape[-1]
    work, itemsize = work_of(hidden), dtype_of(hidden, weight).itemsize
    wide = max(itemsize, 4)
    states = 2 * n * r * wide  # as they are made, and filled up or selected
    of_a = n * h * a.element_size() if a.element_size() != itemsize else 0
    of_b = v * r * wide if b.element_size() < wide else 0
    block = min(work.wide_numbers, n * min(work.tile, v)) * wide if itemsize < wide else 0
    return states + of_a + of_b + block


def number_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    moments: bool,
    low: LowRank | None = None,
) -> int:
    """The operator's plan: what the backward will want, gradients of moments among it."""
    if not torch.is_grad_enabled():
        return FORWARD_ONLY
    of_head = (weight, bias, None if low is None else low.weight)
    if any(x is not None and x.requires_grad for x in of_head):
        return RECOMPUTE
    if not hidden.requires_grad:  # an adapter's A alone is trained: a frozen head costs the same
        return RECOMPUTE if low is not None and low.states.requires_grad else FORWARD_ONLY
    return RECOMPUTE if moments else FROZEN_HEAD


def kept_bytes(hidden: Tensor, weight: Tensor, memory_budget: int | None) -> int:
    """Returns how many bytes of logits are kept for the backward of a trained head.

    Left to us, as many as the head's gradient has, or `KEPT_BYTES`; and of many logits not the
    last, so that no more is held in all than full logits would take.
    """
    if memory_budget is not None:
        return memory_budget
    itemsize, head = dtype_of(hidden, weight).itemsize, weight.numel() * weight.element_size()
    logits = hidden.shape[0] * weight.shape[0] * itemsize
    if logits <= SMALL_BYTES:
        return logits
    kept = max(head if weight.requires_grad else 0, KEPT_BYTES)
    return min(kept, logits - _beside(hidden, weight))


def _beside(hidden: Tensor, weight: Tensor, r: int = 0) -> int:
    """Returns the bytes that forward and backward hold at most beside what is kept.

    With the sums of r columns of an adapter's states.
    """
    (n, h), v = hidden.shape, weight.shape[0]
    itemsize = dtype_of(hidden, weight).itemsize
    forward, backward = work_of(hidden).scratch_bytes(n, v, itemsize)
    wide = torch.promote_types(weight.dtype, torch.float32).itemsize
    sums = n * h * wide if hidden.requires_grad and itemsize < wide else 0
    return max(forward, sums + n * r * wide + backward)


def dtype_of(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Returns the dtype of the products: that of autocast, where it is on, else the wider one."""
    if hidden.dtype != torch.float64 and autocasts(hidden.device):
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)


def cast_bytes(hidden: Tensor, weight: Tensor, *, labels: bool = True) -> int:
    """Returns the bytes of what is cast: states and head, a float32 one by tiles and labels."""
    dtype, (n, h), v = dtype_of(hidden, weight), hidden.shape, weight.shape[0]
    states = n * h * dtype.itemsize if hidden.dtype != dtype else 0
    if weight.dtype == dtype:
        return states
    if weight.dtype != torch.float32:
        return states + v * h * dtype.itemsize
    tile = min(work_of(hidden).tile, v) * h * dtype.itemsize
    of_labels = min(n, CAST_ROWS) * h * (weight.element_size() + dtype.itemsize)
    return states + tile + (of_labels if labels else 0)
