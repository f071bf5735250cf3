"""Checks and folding of arguments, shared by the public functions."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def fold_rows(name: str, x: Tensor) -> Tensor:
    """(..., V) as (N, V) with a contiguous last dimension; raises on a wrong shape or dtype.

    Args:
        name (str): of the argument, for the message.
        x (Tensor): float32, bfloat16, float16 or float64.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: no last dimension, or an empty one.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS and x.dtype != torch.float64:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: expected (..., n) with n >= 1, got shape {tuple(x.shape)}")
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def per_row(
    name: str, value: Tensor, dtype: torch.dtype, shape: torch.Size, like: Tensor
) -> Tensor:
    """A contiguous tensor of one dtype, shape and device; raises on another.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device than those of the rows.
    """
    if not isinstance(value, Tensor) or value.dtype != dtype:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a tensor of {dtype}, got {got}")
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {value.device}")
    return value.contiguous()
