"""The rule's arithmetic on what ranks decide alike, and the integers that rank tokens."""

import torch
from torch import Tensor

from fastadapt import _C

UNIT = 2.0**40
# Factors of a threshold, so that a mass that reaches it but for rounding does.
NEARLY, ALMOST = 1 - 2.0**-19, 1 - 2.0**-52
LAST_ID = 0x7FFFFFFF
MINUS_INF = -0x7F800000  # as an ordered integer
LOWEST = (MINUS_INF + 1) << 31  # the key of no token is below, but of those that are -inf


def masses(d: Tensor) -> tuple[Tensor, Tensor]:
    """Returns integer masses and surprisal masses of float32 distances to the maximum."""
    d = d.contiguous()
    w = torch.empty(d.shape, dtype=torch.int64)
    u = torch.empty_like(w)
    _C.masses(n=d.numel(), d=d, w=w, u=u, num_threads=1)
    return w, u


def log_mass(mass: Tensor) -> Tensor:
    """Returns ln(mass / 2^40) of positive integers, float64."""
    mass = mass.contiguous()
    logs = torch.empty(mass.shape, dtype=torch.float64)
    _C.logs(n=mass.numel(), masses=mass, logs=logs, num_threads=1)
    return logs


def exp64(x: Tensor) -> Tensor:
    """Returns e^x for float64 in [-700, 700]."""
    x = x.contiguous()
    exps = torch.empty_like(x)
    _C.exps(n=x.numel(), x=x, exps=exps, num_threads=1)
    return exps


def draw_target(seeds: Tensor, positions: Tensor, total: Tensor) -> Tensor:
    """Returns floor(X * total / 2^64), X the first 64 bits of Philox4x32-10; int64 (N,)."""
    targets = torch.empty_like(total)
    _C.targets(
        n=len(total),
        seeds=seeds.contiguous(),
        positions=positions.contiguous(),
        totals=total.contiguous(),
        targets=targets,
        num_threads=1,
    )
    return targets


def ordered(x: Tensor) -> Tensor:
    """Returns integers, int64, in the order of float32 numbers; -0 and 0 are one."""
    bits = x.contiguous().view(torch.int32).long()
    return torch.where(bits >= 0, bits, -(bits & LAST_ID))


def from_ordered(o: Tensor) -> Tensor:
    """Returns the float32 numbers of ordered integers."""
    bits = torch.where(o >= 0, o, -o - (1 << 31))  # with the sign's bit, as int32 has it
    return bits.int().view(torch.float32)


def key_of(value: Tensor, ids: Tensor) -> Tensor:
    """Returns one integer for each token: the larger, the better its rank by (value, -id)."""
    return (ordered(value) << 31) | (LAST_ID - ids)


def with_ties(key: Tensor) -> Tensor:
    """Returns the lowest key of the same value."""
    return key >> 31 << 31
