"""Launches of the kernels that edit rows.

Edited rows are written once, in float32, by a kernel of their own: a write of 4 bytes a logit and
one more read, which rows without edits do not pay. No time of it was measured on a GPU.
"""

from typing import Any

import torch
from torch import Tensor

from fastadapt._ops.common import RowEdits
from fastadapt._ops.triton.edits import kernels

BLOCK, TOGETHER = 2048, 128  # logits of a program; edits whose gradients it takes at once
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


def edited(logits: Tensor, edits: RowEdits) -> Tensor:
    """Returns (N, V) logits, edited in float32 where there are edits."""
    ids, offsets, columns, allowed = edits
    if ids is None and allowed is None:
        return logits
    (n, v), out = logits.shape, logits.new_empty(logits.shape, dtype=torch.float32)
    if n == 0:
        return out
    kernels.edit_kernel[n, -(-v // BLOCK)](
        logits, logits.stride(0), v,
        *((ids, offsets, columns, len(ids)) if ids is not None else (logits, logits, logits, 0)),
        *((allowed, allowed.stride(0)) if allowed is not None else (logits, 0)), out,
        CHANGES=_changes_of(columns, allowed), BLOCK=BLOCK, **OPTIONS,
    )  # fmt: skip
    return out


def _changes_of(columns: Tensor | None, allowed: Tensor | None) -> int:
    """What is done to rows, in bits."""
    lists = 0
    if columns is not None:
        lists = kernels.LISTS.value | (kernels.GIVEN.value if len(columns) == 1 else 0)
    return lists | (0 if allowed is None else kernels.MASKS.value)


def through_edits(
    logits: Tensor, edits: RowEdits, dy: Tensor, dvalues: Tensor, of_values: bool
) -> None:
    """Takes a gradient of edited rows, in its place, to the logits, and to values if asked for."""
    ids, offsets, columns, allowed = edits
    n, v = logits.shape
    if ids is not None and n > 0:
        kernels.gradient_kernel[n,](
            logits, logits.stride(0), v, ids, offsets, columns, len(ids), dy, dvalues,
            CHANGES=_changes_of(columns, allowed), GRADIENT=of_values, TOGETHER=TOGETHER, **OPTIONS,
        )  # fmt: skip
