"""The rule's arithmetic in PyTorch, for what ranks decide alike, and the integers that rank tokens.

Every operation is rounded separately, as in csrc/numerics-inl.h.
"""

import torch
from torch import Tensor

UNIT = 2.0**40
# Factors of a threshold, so that a mass that reaches it but for rounding does.
NEARLY, ALMOST = 1 - 2.0**-19, 1 - 2.0**-52
LOG2E, ROUND = 1.4426950216, 12582912.0
EXP2 = (0.00132646, 0.00967149, 0.05550734, 0.24022242, 0.69314698, 1.0)
LN2_HIGH, LN2_LOW = 0.693147180369123816490, 1.90821492927058770002e-10
ROUND64 = 6755399441055744.0
LOW, LAST_ID = 0xFFFFFFFF, 0x7FFFFFFF
MINUS_INF = -0x7F800000  # as an ordered integer
LOWEST = (MINUS_INF + 1) << 31  # the key of no token is below, but of those that are -inf


def masses(d: Tensor) -> tuple[Tensor, Tensor]:
    """Returns integer masses and surprisal masses of float32 distances to the maximum."""
    inside = d >= -28
    d = torch.where(inside, d, 0.0)
    t = d * LOG2E
    r = (t + ROUND) - ROUND
    f = t - r
    p = torch.full_like(f, EXP2[0])
    for c in EXP2[1:]:
        p = p * f + c
    e = p * ((r.to(torch.int32) + 167) << 23).view(torch.float32)  # 2^(40 + r)
    w = torch.where(inside, e, 0.0).to(torch.int64)
    return w, torch.where(inside, e * -d, 0.0).to(torch.int64)


def log64(value: Tensor) -> Tensor:
    """Returns ln of a positive normal float64."""
    bits = value.view(torch.int64)
    exponent = ((bits >> 52) & 0x7FF) - 1023
    mantissa = ((bits & 0xFFFFFFFFFFFFF) | (1023 << 52)).view(torch.float64)
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
    """Returns e^value for float64 in [-700, 700]."""
    k = (value * 1.4426950408889634 + ROUND64) - ROUND64
    r = (value - k * LN2_HIGH) - k * LN2_LOW
    factorials = [1.0]
    for i in range(1, 14):
        factorials.append(factorials[-1] * i)
    series = torch.full_like(r, 1 / factorials[13])
    for i in range(12, -1, -1):
        series = series * r + 1 / factorials[i]
    return series * ((k.long() + 1023) << 52).view(torch.float64)


def log_mass(mass: Tensor) -> Tensor:
    """Returns ln(mass / 2^40), float64."""
    return log64(mass.double() / UNIT)


def draw_target(seeds: Tensor, positions: Tensor, total: Tensor) -> Tensor:
    """Returns floor(X * total / 2^64), X the first 64 bits of Philox4x32-10."""
    k0, k1 = seeds & LOW, (seeds >> 32) & LOW
    c0, c1 = positions & LOW, (positions >> 32) & LOW
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        # the int64 product wraps, and its 64 bits are those of the unsigned product
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high1 = (p0 >> 32) & LOW, (p1 >> 32) & LOW
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & LOW, high0 ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    s0, s1 = total & LOW, total >> 32
    middle = c1 * s0 + (((c0 * s0) >> 32) & LOW)
    cross = (middle & LOW) + c0 * s1
    return c1 * s1 + ((middle >> 32) & LOW) + (cross >> 32)


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
