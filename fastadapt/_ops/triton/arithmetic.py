"""The arithmetic of the sampling rule: masses, ranks, bounds, logarithm, random numbers.

Every operation is rounded separately: kernels that make masses are launched with
`enable_fp_fusion=False`. Constants are those of `reference.arithmetic`.
"""

import math

import triton
import triton.language as tl

from fastadapt._ops.triton.bundles import Bounds

LOG2E = tl.constexpr(1.4426950216)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to the nearest integer
UNIT_BITS = tl.constexpr(40)  # a token of probability 1 has mass 2^40
ROUND64 = tl.constexpr(6755399441055744.0)  # 1.5 * 2^52
# factors of a threshold: reference.bounds
NEARLY = tl.constexpr(1 - 2.0**-19)
ALMOST = tl.constexpr(1 - 2.0**-52)
LN2_HIGH = tl.constexpr(0.693147180369123816490)
LN2_LOW = tl.constexpr(1.90821492927058770002e-10)
EXP64 = tl.constexpr(tuple(1 / math.factorial(i) for i in range(13, -1, -1)))
LAST_ID = tl.constexpr(0x7FFFFFFF)
MIN_INT32 = tl.constexpr(-(2**31))
ONE_KEY = tl.constexpr(1 << 32)  # from a rank to that of the next key
ANY_RANK = tl.constexpr(-(2**63))
NO_RANK = tl.constexpr(2**63 - 1)
LOWEST_KEY = tl.constexpr(-2139095040)  # of -inf
HIGHEST_KEY = tl.constexpr(2139095040)
FINITE_RANK = tl.constexpr((-2139095040 + 1) << 32)  # above every rank of -inf


@triton.jit
def exponentials(d):
    """Returns 2^40 e^d in float32, 0 below d = -28."""
    t = tl.maximum(d, -29.0) * LOG2E
    biased = t + ROUND
    f = t - (biased - ROUND)
    p = f * 0.00132646 + 0.00967149
    p = p * f + 0.05550734
    p = p * f + 0.24022242
    p = p * f + 0.69314698
    p = p * f + 1.0
    # the low bits of biased are the exponent: shifted, they and 40 are added to that of p
    shift = (biased.to(tl.int32, bitcast=True) << 23) + (UNIT_BITS << 23)
    e = (p.to(tl.int32, bitcast=True) + shift).to(tl.float32, bitcast=True)
    return tl.where(d >= -28.0, e, 0.0)


@triton.jit
def masses(d):
    """Returns integer masses of float32 distances to the maximum."""
    return exponentials(d).to(tl.int64)


@triton.jit
def surprisals(d):
    """Returns integer masses times -d, truncated."""
    e = exponentials(d)
    return tl.where(e > 0, e * -d, 0.0).to(tl.int64)


@triton.jit
def keys(s):
    """Maps floats to integers in the same order; both zeros are one."""
    b = s.to(tl.int32, bitcast=True)
    return tl.where(b >= 0, b, MIN_INT32 - b)


@triton.jit
def values(key):
    """Maps integers of `keys` back to floats."""
    return tl.where(key >= 0, key, MIN_INT32 - key).to(tl.float32, bitcast=True)


@triton.jit
def ranks(key, ids):
    """Packs key and id into one integer; a larger rank is more probable, ties by lowest id."""
    return (key.to(tl.int64) << 32) + (LAST_ID - ids)


@triton.jit
def with_ties(rank):
    """Returns the lowest rank with the same key."""
    return rank & -0x100000000


@triton.jit
def log64(value):
    """Returns ln of a positive normal float64 by the atanh series of (f - 1) / (f + 1)."""
    bits = value.to(tl.int64, bitcast=True)
    exponent = ((bits >> 52) & 0x7FF) - 1023
    f = ((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    large = f > 1.4142135623730951
    f = tl.where(large, f * 0.5, f)
    k = (exponent + large.to(tl.int64)).to(tl.float64)
    q = (f - 1.0) / (f + 1.0)
    g = q * q
    series = g * 0.0 + (1 / 21)
    for i in tl.static_range(10):
        series = series * g + 1 / (19 - 2 * i)
    return k * LN2_HIGH + (2.0 * q * series + k * LN2_LOW)


@triton.jit
def log_mass(mass):
    """Returns ln(mass / 2^40) in float64."""
    return log64(mass.to(tl.float64) * 9.094947017729282e-13)  # 2^-40


@triton.jit
def exp64(value):
    """Returns e^value for float64 in [-700, 700]: a Taylor series after a shift by k ln 2."""
    k = (value * 1.4426950408889634 + ROUND64) - ROUND64
    r = (value - k * LN2_HIGH) - k * LN2_LOW
    series = r * 0.0 + EXP64[0]
    for i in tl.static_range(1, 14):
        series = series * r + EXP64[i]
    return series * ((k.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def random_words(seed, position):
    """Returns the words of Philox4x32-10: key = seed, counter = position."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero, zero)


@triton.jit
def draw_target(seed, position, total):
    """Returns floor(U total / 2^64), U 64 bits of Philox: key = seed, counter = position."""
    x0, x1, _, _ = random_words(seed, position)
    u = x0.to(tl.uint64) + (x1.to(tl.uint64) << 32)
    return tl.umulhi(u, total.to(tl.uint64)).to(tl.int64)


@triton.jit
def ceil64(value):
    """Returns the smallest integer above a non-negative float64 under 2^63."""
    whole = value.to(tl.int64)
    return whole + (whole.to(tl.float64) < value).to(tl.int64)


@triton.jit
def typicality(d, centre):
    """Returns -kappa = -|d + U / Z|."""
    return -tl.abs(d + centre)


@triton.jit
def survives(s, ids, m, bounds):
    """Whether tokens survive under bounds."""
    d = s - m
    rank = ranks(keys(s), ids)
    mass = exponentials(d).to(tl.int64)
    alive = rank >= bounds.cut
    alive &= (mass >= bounds.mass) | (rank >= bounds.guard)
    alive &= (mass >= bounds.cutoff) | (rank >= bounds.cutoff_guard)
    return alive & (ranks(keys(typicality(d, bounds.centre)), ids) >= bounds.band)


@triton.jit
def only_cut(bounds):
    """Whether the survivors are exactly those from a rank up."""
    free = ((bounds.mass == 0) | (bounds.guard == ANY_RANK)) & (bounds.band == ANY_RANK)
    return free & ((bounds.cutoff == 0) | (bounds.cutoff_guard == ANY_RANK))


@triton.jit
def bounds_from(rank):
    """Returns the bounds under which all tokens from a rank up survive."""
    none = tl.full([], 0, tl.int64)
    any_rank = none + ANY_RANK
    return Bounds(none + rank, none, any_rank, none, any_rank, any_rank, none.to(tl.float32))


@triton.jit
def _floor_by_mass(mass, guard, m):
    """Returns a logit below which no token has a mass or a rank from a guard up."""
    d = log64(tl.maximum(mass, 1).to(tl.float64) * 9.094947017729282e-13).to(tl.float32)  # 2^-40
    floor = tl.where(mass > 0, m + d - (1e-3 + tl.abs(m) * 3e-7), float("-inf"))
    key = tl.minimum(tl.maximum(guard >> 32, LOWEST_KEY), HIGHEST_KEY).to(tl.int32)
    return tl.minimum(floor, values(key))


@triton.jit
def floor_of(bounds, m):
    """Returns a scaled logit below which no token survives under bounds."""
    key = tl.minimum(tl.maximum(bounds.cut >> 32, LOWEST_KEY), HIGHEST_KEY).to(tl.int32)
    floor = tl.maximum(values(key), _floor_by_mass(bounds.mass, bounds.guard, m))
    return tl.maximum(floor, _floor_by_mass(bounds.cutoff, bounds.cutoff_guard, m))


@triton.jit
def min_p_mass(value):
    """Returns the least mass that min-p keeps."""
    return ceil64(value.to(tl.float32).to(tl.float64) * 1099511627776.0 * NEARLY)


@triton.jit
def mass_target(part_of_z):
    """Returns the mass up to which a nucleus takes tokens."""
    return tl.maximum(ceil64(part_of_z * ALMOST), 1)


@triton.jit
def cutoff_of(by_eta, value, z, u):
    """Returns the probability below which epsilon or eta drops a token."""
    p = value
    if by_eta:
        entropy = log_mass(z) + u.to(tl.float64) / z.to(tl.float64)
        p = tl.minimum(p, tl.sqrt(p) * exp64(-entropy))
    return p
