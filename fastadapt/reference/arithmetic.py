"""The arithmetic of the sampling rule: masses, logarithm, exponential.

Every operation is rounded separately, so that each implementation computes the same bits.
"""

import torch
from torch import Tensor

UNIT = 2.0**40
LOG2E, ROUND = 1.4426950216, 12582912.0  # ROUND = 1.5 * 2^23 rounds to the nearest integer
EXP2 = (0.00132646, 0.00967149, 0.05550734, 0.24022242, 0.69314698, 1.0)
LN2_HIGH, LN2_LOW = 0.693147180369123816490, 1.90821492927058770002e-10
ROUND64 = 6755399441055744.0  # 1.5 * 2^52


def masses(d: Tensor) -> tuple[Tensor, Tensor]:
    """Returns integer masses and surprisal masses of float32 distances to the maximum.

    Args:
        d (Tensor): any shape, float32, <= 0 or -inf.

    Returns:
        Tensor, Tensor: int64, trunc(2^40 e^d) and trunc(2^40 e^d (-d)); both 0 below d = -28. The
        polynomial's relative error is at most 1.8e-6.
    """
    t = d * LOG2E
    r = (t + ROUND) - ROUND
    f = t - r
    p = torch.full_like(f, EXP2[0])
    for c in EXP2[1:]:
        p = p * f + c
    scale = ((r.clamp(min=-60).to(torch.int32) + 167) << 23).view(torch.float32)  # 2^(40+r)
    e = p * scale
    inside = d >= -28
    w = torch.where(inside, e, 0.0).to(torch.int64)
    u = torch.where(inside, e * -d, 0.0).to(torch.int64)
    return w, u


def log64(value: Tensor) -> Tensor:
    """Returns ln of a positive normal float64 by an atanh series, every step rounded."""
    bits = value.view(torch.int64)
    exponent = ((bits >> 52) & 0x7FF) - 1023
    mantissa = ((bits & 0xFFFFFFFFFFFFF) | (1023 << 52)).view(torch.float64)  # [1, 2)
    large = mantissa > 1.4142135623730951
    mantissa = torch.where(large, mantissa * 0.5, mantissa)
    k = (exponent + large.long()).double()
    f = (mantissa - 1) / (mantissa + 1)
    g = f * f
    series = torch.full_like(g, 1 / 21)
    for odd in range(19, 0, -2):
        series = series * g + 1 / odd
    return k * LN2_HIGH + (2 * f * series + k * LN2_LOW)


def exp64(value: Tensor) -> Tensor:
    """Returns e^value for float64 in [-700, 700] by a Taylor series, every step rounded."""
    k = (value * 1.4426950408889634 + ROUND64) - ROUND64
    r = (value - k * LN2_HIGH) - k * LN2_LOW
    factorials = [1.0]
    for i in range(1, 14):
        factorials.append(factorials[-1] * i)
    series = torch.full_like(r, 1 / factorials[13])
    for i in range(12, -1, -1):
        series = series * r + 1 / factorials[i]
    return series * ((k.long() + 1023) << 52).view(torch.float64)
