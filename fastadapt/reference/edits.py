"""Edited logits: listed changes, then a mask of allowed tokens, then the real vocabulary."""

from typing import Any

import torch
from torch import Tensor

Changes = Any  # an Edits, or anything with its attributes


def edited(
    logits: Tensor,
    edits: Changes | None = None,
    allowed: Tensor | None = None,
    num_tokens: int | None = None,
) -> Tensor:
    """Returns edited logits in float32, those of float64 in float64.

    Args:
        logits (Tensor): (..., V).
        edits (Changes | None): of its rows.
        allowed (Tensor | None): (..., ceil(V / 32)), int32; V may be `num_tokens`.
        num_tokens (int | None): 1 to V.
    """
    v = logits.shape[-1]
    x = logits.reshape(-1, v)
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if edits is not None:
        rows = torch.arange(len(x), device=x.device).repeat_interleave(edits.offsets.diff())
        at = rows, edits.ids.long()
        y = y.index_put(at, _changed(y[at], edits.columns.to(y.dtype)))
    if allowed is not None:
        words = allowed.reshape(len(x), allowed.shape[-1], 1)
        bits = (words >> torch.arange(32, device=x.device) & 1).flatten(1)[:, :v]
        y = y.masked_fill(torch.nn.functional.pad(bits, (0, v - bits.shape[1])) == 0, float("-inf"))
    if num_tokens is not None:
        y = y.masked_fill(torch.arange(v, device=x.device) >= num_tokens, float("-inf"))
    return y.view(logits.shape)


def _changed(x: Tensor, columns: Tensor) -> Tensor:
    """Returns what edits make of their logits."""
    if len(columns) == 1:
        return columns[0]
    pre, penalty, post, last = columns
    y = x + pre
    y = torch.where(y > 0, y / penalty, y * penalty) + post + last
    return torch.where(x == float("-inf"), x, y)
