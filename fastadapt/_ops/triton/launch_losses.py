"""Launches of the log-odds kernels for CUDA tensors: scratch and grids. Nothing here synchronises.

Every tile of every row is one program, so that few rows keep a device as busy as many.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastadapt._ops.outputs import Pair
from fastadapt._ops.triton import label
from fastadapt._ops.triton.bundles import Candidates, Labels, Rows, Sums, Tops

BY_TILE: dict[str, int | bool] = {"num_warps": 4, "enable_fp_fusion": False}
BY_ROW: dict[str, int | bool] = {"num_warps": 1, "enable_fp_fusion": False}


class Plan(NamedTuple):
    """Sizes of blocks and tiles, powers of two. Another tile changes the rounding of sums."""

    block: int = 4096  # logits of a tile
    candidates: int = 64  # of a row, at a time


PLAN = Plan()


def _rows(logits: Tensor) -> Rows:
    """Bundles rows of logits for the kernels."""
    return Rows(logits, logits.stride(0), logits.shape[1])


def _candidates(index: Tensor, mask: Tensor | None) -> Candidates:
    """Bundles candidates for the kernels."""
    return Candidates(index, index if mask is None else mask.view(torch.uint8), index.shape[1])


def label_log_odds(
    logits: Tensor, labels: Tensor, ignore_index: int, out: Pair, plan: Plan = PLAN
) -> None:
    """Computes log-odds and statistics."""
    n, tiles = logits.shape[0], triton.cdiv(logits.shape[1], plan.block)
    if n == 0:
        return
    double = logits.dtype == torch.float64
    tops, totals = logits.new_empty(2, n, tiles, dtype=torch.float64)
    shared = _rows(logits), Labels(labels, ignore_index), Sums(tops, totals, tiles)
    label.label_sum_kernel[(n, tiles)](*shared, DOUBLE=double, BLOCK=plan.block, **BY_TILE)
    label.label_log_odds_kernel[(n,)](
        *shared, *out, DOUBLE=double, TILES=triton.next_power_of_2(tiles), **BY_ROW
    )


def label_log_odds_backward(
    dlog_odds: Tensor,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    stats: Tensor,
    out: Tensor,
    plan: Plan = PLAN,
) -> None:
    """Computes the gradient of the logits."""
    n, v = logits.shape
    if n == 0:
        return
    label.label_backward_kernel[(n, triton.cdiv(v, plan.block))](
        dlog_odds.contiguous(),
        _rows(logits),
        Labels(labels, ignore_index),
        stats,
        out,
        DOUBLE=logits.dtype == torch.float64,
        BLOCK=plan.block,
        **BY_TILE,
    )


def candidate_log_odds(
    logits: Tensor, index: Tensor, mask: Tensor | None, out: Pair, plan: Plan = PLAN
) -> None:
    """Computes log-odds and statistics."""
    n, tiles = logits.shape[0], triton.cdiv(logits.shape[1], plan.block)
    if n == 0:
        return
    sizes = {"DOUBLE": logits.dtype == torch.float64, "BLOCK": plan.block}
    tops, seconds, totals = logits.new_empty(3, n, tiles, dtype=torch.float64)
    found = Tops(tops, logits.new_empty(n, tiles, dtype=torch.int32), seconds, totals, tiles)
    label.top_sum_kernel[(n, tiles)](_rows(logits), found, **sizes, **BY_TILE)
    label.candidate_log_odds_kernel[(n,)](
        _rows(logits),
        _candidates(index, mask),
        found,
        *out,
        MASKED=mask is not None,
        TILES=triton.next_power_of_2(tiles),
        CANDIDATES=plan.candidates,
        **sizes,
        **BY_ROW,
    )


def candidate_log_odds_backward(
    dlog_odds: Tensor,
    logits: Tensor,
    index: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    out: Tensor,
    plan: Plan = PLAN,
) -> None:
    """Computes the gradient of the logits."""
    n, v = logits.shape
    if n == 0:
        return
    double = {"DOUBLE": logits.dtype == torch.float64}
    rows, candidates = _rows(logits), _candidates(index, mask)
    each = {**double, "MASKED": mask is not None, "CANDIDATES": plan.candidates}
    factors = logits.new_empty(n, 2, dtype=torch.float64)
    upstream = dlog_odds.contiguous(), rows, candidates, stats, factors
    label.candidate_factor_kernel[(n,)](*upstream, **each, **BY_ROW)
    label.candidate_backward_kernel[(n, triton.cdiv(v, plan.block))](
        rows, stats, factors, out, **double, BLOCK=plan.block, **BY_TILE
    )
    if index.shape[1] > 0:
        label.candidate_own_kernel[(n, triton.cdiv(index.shape[1], plan.candidates))](
            *upstream, out, **each, **BY_TILE
        )
