"""What the tensors of responses must be: their dtypes, shapes and devices."""

from typing import Protocol

import torch
from torch import Tensor

from fastadapt._ops.checks import instance

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# what is meant where a tensor of another dtype comes
_OTHER_WAY = {
    (torch.bool, torch.int64): "; Responses.from_labels takes labels",
    (torch.int64, torch.bool): "; Responses(log_odds, mask) takes a mask",
}
FIELDS = ("log_odds", "mask", "segments", "num_segments", "total_tokens", "total_sequences")


class Labelled(Protocol):
    """The fields of `Responses`, for what computes with them and needs none of its constructors."""

    @property
    def log_odds(self) -> Tensor:
        """(B, T) or (N,)."""

    @property
    def mask(self) -> Tensor | None:
        """(B, T), or None beside segments."""

    @property
    def segments(self) -> Tensor | None:
        """(N,), or None beside a mask."""

    @property
    def num_segments(self) -> int | None:
        """B of the packed layout."""

    @property
    def total_tokens(self) -> int | Tensor | None:
        """What token means divide by."""

    @property
    def total_sequences(self) -> int | Tensor | None:
        """What means over responses divide by."""


def beside(name: str, value: Tensor, responses: Labelled, *, columns: bool = False) -> None:
    """Raises unless a tensor has the shape of the log-odds, with `columns` (..., K), and device."""
    instance(name, value, Tensor, "a Tensor")
    like = responses.log_odds
    if (value.shape[:-1] if columns else value.shape) != like.shape:
        shape = ", ".join([*map(str, like.shape), *(["K"] if columns else [])])
        raise ValueError(f"{name}: expected shape ({shape}), got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {value.device}")


def accumulated(name: str, log_odds: Tensor) -> Tensor:
    """Converts log-odds to the dtype in which sums are made."""
    if not isinstance(log_odds, Tensor) or log_odds.dtype not in _FLOATS:
        got = log_odds.dtype if isinstance(log_odds, Tensor) else type(log_odds).__name__
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {got}")
    return log_odds if log_odds.dtype == torch.float64 else log_odds.float()


def like_log_odds(name: str, value: Tensor, dtype: torch.dtype, log_odds: Tensor, dim: int) -> None:
    """Raises unless a tensor has a dtype, and the shape, device and rank of the log-odds."""
    if not isinstance(value, Tensor) or value.dtype != dtype:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        hint = _OTHER_WAY.get((dtype, got), "")
        raise TypeError(f"{name}: expected a tensor of {dtype}, got {got}{hint}")
    if value.shape != log_odds.shape or log_odds.dim() != dim:
        layout = "(B, T)" if dim == 2 else "(N,)"
        raise ValueError(
            f"{name}: expected the shape of the log-odds, {layout}, got {tuple(value.shape)} "
            f"beside {tuple(log_odds.shape)}"
        )
    if value.device != log_odds.device:
        raise ValueError(f"{name}: expected device {log_odds.device}, got {value.device}")


def labels_in_rows(labels: Tensor) -> None:
    """Raises unless labels are (B, T), int64."""
    instance("labels", labels, Tensor, "a Tensor")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected a tensor of torch.int64, got {labels.dtype}")
    if labels.dim() != 2:
        raise ValueError(f"labels: expected shape (B, T), got {tuple(labels.shape)}")
