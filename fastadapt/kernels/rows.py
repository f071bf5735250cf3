"""A row, its list and its survivors: what the kernels that decide and those that write share."""

import triton
import triton.language as tl

from fastadapt.kernels.arithmetic import (
    ANY_RANK,
    FINITE_RANK,
    exponentials,
    keys,
    ranks,
)

OK = tl.constexpr(0)
NAN = tl.constexpr(1)
POSITIVE_INF = tl.constexpr(2)
NOTHING_FINITE = tl.constexpr(3)
BAD_KNOB = tl.constexpr(4)

# The order of the packed knobs.
TEMPERATURE = tl.constexpr(0)
TOP_K = tl.constexpr(1)
TOP_P = tl.constexpr(2)
MIN_P = tl.constexpr(3)
TYPICAL_P = tl.constexpr(4)
EPSILON = tl.constexpr(5)
ETA = tl.constexpr(6)
KEEP = tl.constexpr(7)
MAX_KEEP = tl.constexpr(1 << 22)  # the longest row

# A law: what says which tokens survive, in int64.
LAW_CUT = tl.constexpr(0)  # the lowest rank that stays
LAW_MASS = tl.constexpr(1)  # min-p: the least mass, or
LAW_GUARD = tl.constexpr(2)  # the rank from which any mass stays
LAW_CUTOFF = tl.constexpr(3)  # the same of epsilon and eta
LAW_CUTOFF_GUARD = tl.constexpr(4)
LAW_BAND = tl.constexpr(5)  # typical: the lowest rank of -kappa that stays
LAW_CENTRE = tl.constexpr(6)  # the bits of U / Z
LAW_STATUS = tl.constexpr(7)
LAW_KEPT = tl.constexpr(8)
LAW_TOTAL = tl.constexpr(9)  # the mass of the survivors
LAW_SIZE = tl.constexpr(10)


@triton.jit
def load_knob(knobs, knob, step):
    """A knob of a row, float64."""
    return tl.load(knobs + knob * step)


@triton.jit
def inverse_of(temperature):
    """fl32(1 / T); 1 where T is 0, anything where it is out of range."""
    usable = (temperature > 0) & (temperature <= 3.4028234663852886e38)
    return tl.div_rn(1.0, tl.where(usable, temperature, temperature * 0 + 1).to(tl.float32))


@triton.jit
def is_neutral(knob, value):
    """A knob that filters nothing; a NaN is not."""
    return tl.where((knob == TOP_P) | (knob == TYPICAL_P), value == 1, value == 0)


@triton.jit
def knobs_in_range(knobs, step):
    """Whether every knob of a row is; NaN never is."""
    t = load_knob(knobs, TEMPERATURE, step)
    good = (t == 0) | ((t >= 1e-6) & (t <= 3.4028234663852886e38))
    good &= load_knob(knobs, TOP_K, step) >= 0
    top_p = load_knob(knobs, TOP_P, step)
    good &= (top_p >= 0) & (top_p <= 1)
    min_p = load_knob(knobs, MIN_P, step)
    good &= (min_p >= 0) & (min_p <= 1)
    typical_p = load_knob(knobs, TYPICAL_P, step)
    good &= (typical_p > 0) & (typical_p <= 1)
    epsilon = load_knob(knobs, EPSILON, step)
    good &= (epsilon >= 0) & (epsilon < 1)
    eta = load_knob(knobs, ETA, step)
    good &= (eta >= 0) & (eta < 1)
    return good & (load_knob(knobs, KEEP, step) >= 1)


@triton.jit
def filter_at(step, vllm):
    """The knob of the filter that runs at a step, 0 to 5: min-p is first, or after top-p."""
    early = tl.where(step == 0, MIN_P, step)
    return tl.where((vllm == 1) & (step < 3), early, step + 1)


@triton.jit
def first_filter(knobs, step, vllm):
    """The knob of the first filter that is not neutral, 0 if all are."""
    first = tl.full([], 0, tl.int32)
    for i in range(6):
        at = filter_at(i, vllm).to(tl.int32)
        active = is_neutral(at, load_knob(knobs, at, step)) == 0
        first = tl.where((first == 0) & active, at, first)
    return first


@triton.jit
def needs_masses(first):
    """Whether a row is weighed whole, by its first filter: all but top-k and min-p look at Z."""
    return (first == 0) | (first == TOP_P) | (first >= TYPICAL_P)


@triton.jit
def needs_surprisal(knobs, step):
    """Whether a filter of a row looks at its entropy."""
    typical = load_knob(knobs, TYPICAL_P, step) != 1
    return typical | (load_knob(knobs, ETA, step) != 0)


@triton.jit
def largest_of(parts, splits, SPLITS: tl.constexpr):
    """The largest logit of a row from those of its parts; NaN if one is."""
    at = tl.arange(0, SPLITS)
    part = tl.load(parts + at, mask=at < splits, other=float("-inf"))
    nan = tl.max((part != part).to(tl.int32), 0) > 0
    return tl.where(nan, float("nan"), tl.max(tl.where(part != part, float("-inf"), part), 0))


@triton.jit
def status_of(knobs, step, m):
    """The status of a row whose largest scaled logit is m."""
    status = tl.where(m == float("-inf"), NOTHING_FINITE, OK)
    status = tl.where(m == float("inf"), POSITIVE_INF, status)
    status = tl.where(m != m, NAN, status)
    return tl.where(knobs_in_range(knobs, step), status, BAD_KNOB)


@triton.jit
def typicality(d, centre):
    """-kappa = -|d + U / Z|."""
    return -tl.abs(d + centre)


@triton.jit
def survives(s, ids, m, law):
    """Whether tokens survive under a law (a tuple in the order of LAW_CUT to LAW_CENTRE)."""
    d = s - m
    rank = ranks(keys(s), ids)
    mass = exponentials(d).to(tl.int64)
    alive = rank >= law[0]
    alive &= (mass >= law[1]) | (rank >= law[2])
    alive &= (mass >= law[3]) | (rank >= law[4])
    return alive & (ranks(keys(typicality(d, law[6])), ids) >= law[5])


@triton.jit
def everything():
    """The law under which every finite token survives."""
    none = tl.full([], 0, tl.int64)
    any_rank = none + ANY_RANK
    return none + FINITE_RANK, none, any_rank, none, any_rank, any_rank, none.to(tl.float32)


@triton.jit
def load_law(laws):
    """A law from memory."""
    centre = tl.load(laws + LAW_CENTRE).to(tl.int32).to(tl.float32, bitcast=True)
    return (
        tl.load(laws + LAW_CUT),
        tl.load(laws + LAW_MASS),
        tl.load(laws + LAW_GUARD),
        tl.load(laws + LAW_CUTOFF),
        tl.load(laws + LAW_CUTOFF_GUARD),
        tl.load(laws + LAW_BAND),
        centre,
    )


@triton.jit
def load_scaled(row, offsets, v, inverse):
    """Scaled logits, -inf past the end."""
    x = tl.load(row + offsets, mask=offsets < v, other=float("-inf"))
    return x.to(tl.float32) * inverse
