"""Numbers that a history takes: one for all rows, or one for each, checked."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastadapt._ops.checks import instance, integer, integers, number, shown

MOST = 2**62
# so that neither they nor their sums nor multiples leave float32, where +inf would be no logit
MOST_REAL = 1e28


def ids_of(name: str, ids: Sequence[int]) -> list[int]:
    """Returns ids ascending, each once."""
    instance(name, ids, Sequence, "a sequence of ids")
    return sorted({integer(name, i, 0, 2**31 - 1) for i in ids})


def on_host(name: str, tokens: Tensor) -> Tensor:
    """Returns integers as contiguous int64 on the CPU."""
    if tokens.dtype == torch.int64 and tokens.device.type == "cpu" and tokens.is_contiguous():
        return tokens  # as they nearly always are: a step asks for nothing else
    return integers(name, tokens.cpu()).contiguous()


def whole(name: str, value: int | Tensor, rows: int, low: int, high: int | Tensor = MOST) -> Tensor:
    """Returns an integer for each row, int64 on the CPU, in [low, high]."""
    if isinstance(value, Tensor):
        _of_rows(name, value, rows)
        given = on_host(name, value)
    else:
        given = torch.full((rows,), integer(name, value), dtype=torch.int64, device="cpu")
    bad = (given < low) | (given > high)
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        most = int(high[at]) if isinstance(high, Tensor) else high
        expected = f"at least {low}" if most == MOST else f"{low} to {most}"
        raise ValueError(f"{name}: expected {expected}, got {int(given[at])} in row {at}")
    return given


def one_or_whole(name: str, value: int | Tensor, rows: int, low: int) -> int | Tensor:
    """Returns an integer of at least `low`, or one for each row."""
    if isinstance(value, Tensor):
        return whole(name, value, rows, low)
    return integer(name, value, low)


def one_or_real(name: str, value: float | Tensor, rows: int, **kind: bool) -> float | Tensor:
    """Returns a number, or float64 on the CPU with one for each row, of a kind of `number`."""
    if not isinstance(value, Tensor):
        return real(name, value, **kind)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a number or a tensor of floats, got {value.dtype}")
    _of_rows(name, value, rows)
    given = value.to("cpu", torch.float64).contiguous()
    for one in given.tolist():
        real(name, one, **kind)
    return given


def real(name: str, value: float, *, positive: bool = False, signed: bool = False) -> float:
    """Returns a number of a kind of `number`, of no more than 28 digits before and behind 1."""
    found = number(name, value, positive=positive, signed=signed)
    if abs(found) > MOST_REAL or (positive and found < 1 / MOST_REAL):
        least = 1 / MOST_REAL if positive else -MOST_REAL if signed else 0
        raise ValueError(f"{name}: expected {least:g} to {MOST_REAL:g}, got {shown(found)}")
    return float(found)


def _of_rows(name: str, value: Tensor, rows: int) -> None:
    """Raises unless there is a number for each row."""
    if value.shape != (rows,):
        raise ValueError(f"{name}: expected shape ({rows},), got {tuple(value.shape)}")
