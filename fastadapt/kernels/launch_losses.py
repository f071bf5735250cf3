"""What the operators of margins call for CUDA tensors: scratch, grids. Nothing here synchronises.

Every tile of every row is one program, so that few rows keep a device as busy as many.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastadapt.kernels import label

TILE_WARPS, ROW_WARPS = 4, 1


class Plan(NamedTuple):
    """Sizes, powers of two. Sums are rounded by the tile: another block, other last bits."""

    block: int = 4096  # logits of a tile
    candidates: int = 64  # of a row, at a time


PLAN = Plan()
Arguments = tuple[Tensor | int, ...]


def _rows(logits: Tensor) -> Arguments:
    """What the kernels need to know of rows."""
    return logits, logits.stride(0), logits.shape[1]


def _candidates(index: Tensor, mask: Tensor | None) -> tuple[Arguments, dict[str, bool]]:
    """What they need to know of candidates."""
    meant = index if mask is None else mask.view(torch.uint8)
    return (index, meant, index.shape[1]), {"MASKED": mask is not None}


def label_margins(
    logits: Tensor, labels: Tensor, ignore_index: int, out: tuple[Tensor, Tensor], plan: Plan = PLAN
) -> None:
    """Margins and statistics."""
    n, tiles = logits.shape[0], triton.cdiv(logits.shape[1], plan.block)
    if n == 0:
        return
    double = logits.dtype == torch.float64
    scratch = logits.new_empty(2, n, tiles, dtype=torch.float64)
    shared = (*_rows(logits), labels, ignore_index, *scratch, tiles)
    label.label_sum_kernel[(n, tiles)](
        *shared, DOUBLE=double, BLOCK=plan.block, num_warps=TILE_WARPS, enable_fp_fusion=False
    )
    label.label_margin_kernel[(n,)](
        *shared,
        *out,
        DOUBLE=double,
        TILES=triton.next_power_of_2(tiles),
        num_warps=ROW_WARPS,
        enable_fp_fusion=False,
    )


def label_margins_backward(
    dmargins: Tensor,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    stats: Tensor,
    out: Tensor,
    plan: Plan = PLAN,
) -> None:
    """The gradient of the logits."""
    n, v = logits.shape
    if n == 0:
        return
    label.label_backward_kernel[(n, triton.cdiv(v, plan.block))](
        dmargins,
        *_rows(logits),
        labels,
        ignore_index,
        stats,
        out,
        DOUBLE=logits.dtype == torch.float64,
        BLOCK=plan.block,
        num_warps=TILE_WARPS,
        enable_fp_fusion=False,
    )


def candidate_margins(
    logits: Tensor,
    index: Tensor,
    mask: Tensor | None,
    out: tuple[Tensor, Tensor],
    plan: Plan = PLAN,
) -> None:
    """Margins and statistics."""
    n, tiles = logits.shape[0], triton.cdiv(logits.shape[1], plan.block)
    if n == 0:
        return
    sizes = {"DOUBLE": logits.dtype == torch.float64, "BLOCK": plan.block}
    tops, seconds, sums = logits.new_empty(3, n, tiles, dtype=torch.float64)
    top_ids = logits.new_empty(n, tiles, dtype=torch.int32)
    found = (tops, top_ids, seconds, sums, tiles)
    label.top_sum_kernel[(n, tiles)](
        *_rows(logits), *found, **sizes, num_warps=TILE_WARPS, enable_fp_fusion=False
    )
    candidates, masked = _candidates(index, mask)
    label.candidate_margin_kernel[(n,)](
        *_rows(logits),
        *candidates,
        *found,
        *out,
        **masked,
        **sizes,
        TILES=triton.next_power_of_2(tiles),
        CANDIDATES=plan.candidates,
        num_warps=ROW_WARPS,
        enable_fp_fusion=False,
    )


def candidate_margins_backward(
    dmargins: Tensor,
    logits: Tensor,
    index: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    out: Tensor,
    plan: Plan = PLAN,
) -> None:
    """The gradient of the logits."""
    n, v = logits.shape
    if n == 0:
        return
    double = {"DOUBLE": logits.dtype == torch.float64}
    candidates, masked = _candidates(index, mask)
    upstream = (dmargins, *_rows(logits), *candidates, stats)
    each = {**masked, **double, "CANDIDATES": plan.candidates}
    factors = logits.new_empty(n, 2, dtype=torch.float64)
    label.candidate_factor_kernel[(n,)](
        *upstream, factors, **each, num_warps=ROW_WARPS, enable_fp_fusion=False
    )
    label.candidate_backward_kernel[(n, triton.cdiv(v, plan.block))](
        *_rows(logits),
        stats,
        factors,
        out,
        **double,
        BLOCK=plan.block,
        num_warps=TILE_WARPS,
        enable_fp_fusion=False,
    )
    if index.shape[1] == 0:
        return
    label.candidate_own_kernel[(n, triton.cdiv(index.shape[1], plan.candidates))](
        *upstream, factors, out, **each, num_warps=TILE_WARPS, enable_fp_fusion=False
    )
