"""Rows of logits as the operators take them: the real vocabulary, checked edits and masks."""

import torch
from torch import Tensor

from fastadapt._ops.checks import instance, integer
from fastadapt._ops.common import AS_THEY_ARE, RowEdits
from fastadapt.sampling.edits import Edits


def edited_rows(
    rows: Tensor,
    leading: torch.Size,
    edits: Edits | None,
    allowed: Tensor | None,
    num_tokens: int | None,
) -> tuple[Tensor, RowEdits]:
    """Returns the logits of the real vocabulary and what operators take of edits, checked.

    Args:
        rows (Tensor): (N, V), float32 or half precision where there are edits.
        leading (torch.Size): the shape of the logits without V.
        edits (Edits | None): of N rows.
        allowed (Tensor | None): (*leading, ceil(V / 32)), int32, V of all logits or the real one.
        num_tokens (int | None): 1 to V.

    Raises:
        TypeError: something else than edits, words of another dtype, float64 logits.
        ValueError: another number of rows or words, another device, ids beyond V.
    """
    v = rows.shape[1]
    if num_tokens is not None:
        rows = rows[:, : integer("num_tokens", num_tokens, 1, v)]
    if edits is None and allowed is None:
        return rows, AS_THEY_ARE
    if rows.dtype == torch.float64:
        raise TypeError(
            f"{'allowed' if edits is None else 'edits'}: expected float32, bfloat16 or float16 "
            "logits, got torch.float64; fastadapt.reference takes it"
        )
    words = None if allowed is None else _words(allowed, leading, v, rows)
    changes = RowEdits(allowed=words)
    if edits is not None:
        instance("edits", edits, Edits, "Edits")
        if edits.rows != rows.shape[0]:
            raise ValueError(f"edits: expected {rows.shape[0]} rows, got {edits.rows}")
        if edits.ids.device != rows.device:
            raise ValueError(f"edits: expected device {rows.device}, got {edits.ids.device}")
        if edits.largest >= v:
            raise ValueError(f"edits: expected ids in [0, {v}), got {edits.largest}")
        changes = RowEdits(edits.ids, edits.offsets, edits.columns, words)
    return rows, changes


def _words(allowed: object, leading: torch.Size, v: int, rows: Tensor) -> Tensor:
    """Returns the words of allowed ids as (N, ceil(V / 32))."""
    instance("allowed", allowed, Tensor, "a tensor of torch.int32")
    assert isinstance(allowed, Tensor)  # noqa: S101, for the type checker
    if allowed.dtype != torch.int32:
        raise TypeError(f"allowed: expected a tensor of torch.int32, got {allowed.dtype}")
    width = allowed.shape[-1] if allowed.dim() else 0
    whole, real = -(-v // 32), -(-rows.shape[1] // 32)  # words of all logits, and of real tokens
    shape = (*leading, width if width in (whole, real) else whole)
    if allowed.shape != shape:
        raise ValueError(f"allowed: expected shape {shape}, got {tuple(allowed.shape)}")
    if allowed.device != rows.device:
        raise ValueError(f"allowed: expected device {rows.device}, got {allowed.device}")
    words = allowed if allowed.dim() == 2 else allowed.reshape(-1, shape[-1])
    return words if words.stride(1) == 1 or words.shape[1] == 1 else words.contiguous()
