"""Argument checks and reshaping shared by the public functions."""

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def fold_rows(name: str, x: Tensor, *, double: bool = True) -> Tensor:
    """Reshapes (..., V) to (N, V) with a contiguous last dimension; checks shape and dtype.

    Args:
        name (str): of the argument, for the message.
        x (Tensor): float32, bfloat16, float16, or float64 where that is allowed.
        double (bool): whether it is.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: no last dimension, or an empty one.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS and not (double and x.dtype == torch.float64):
        expected = (
            "float32, bfloat16, float16 or float64" if double else "float32, bfloat16 or float16"
        )
        hint = "; fastadapt.reference takes it" if x.dtype == torch.float64 else ""
        raise TypeError(f"{name}: expected {expected}, got {x.dtype}{hint}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: expected (..., V) with V >= 1, got shape {tuple(x.shape)}")
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def per_row(
    name: str, value: Tensor, dtype: torch.dtype, shape: torch.Size, like: Tensor
) -> Tensor:
    """Flattens a tensor with one value per row; checks shape, dtype and device.

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
    flat = value.dim() == 1 and value.is_contiguous()
    return value if flat else value.reshape(-1).contiguous()


def integer(name: str, value: object, low: int, high: int) -> int:
    """Returns an integer in [low, high], NumPy's included; raises for anything else.

    Raises:
        TypeError: not an integer; a bool is none.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    number = int(value)
    if not low <= number <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {number}")
    return number


def integers(name: str, values: Tensor | Sequence[int]) -> Tensor:
    """Converts integers to an int64 tensor of the same shape, on their device.

    Args:
        name (str): of the argument, for the message.
        values (Tensor or sequence of int): of any integer type, each in [-2**63, 2**63).

    Raises:
        TypeError: something else than integers.
        ValueError: an integer that int64 does not hold, or sequences of unequal lengths.
    """
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        numbers = isinstance(values, Sequence) and all(isinstance(v, int) for v in values)
        kind = ValueError if numbers else TypeError
        raise kind(f"{name}: expected integers in [-2**63, 2**63), got {values!r}") from error
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name}: expected integers, got {tensor.dtype}")
    whole = tensor.to(torch.int64)
    if tensor.dtype == torch.uint64 and bool((whole < 0).any()):
        raise ValueError(f"{name}: expected integers in [-2**63, 2**63), got {values!r}")
    return whole
