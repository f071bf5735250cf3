"""A row, its knobs and its record in memory, for all kernels of sampling."""

import triton
import triton.language as tl
from triton.language.extra import cuda

from fastadapt._ops.triton.bundles import Bounds, Knobs, List, Parts, Weights

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
NUM_KNOBS = tl.constexpr(14)
MAX_KEEP = tl.constexpr(1 << 22)  # the longest row

# What a call asks for, in one integer, which kernels do not specialise: the number of adaptors, and
# below it these bits.
VLLM = tl.constexpr(1)  # the order of the filters
PER_ROW = tl.constexpr(2)  # knobs have a value for each row
POSITIONS = tl.constexpr(4)
BASE_LOGPROBS = tl.constexpr(8)  # log-probabilities under the base distribution
LOG_MASS = tl.constexpr(16)
ALL_WEIGHED = tl.constexpr(32)  # masses of all rows
BASE = tl.constexpr(64)  # also at temperature 1
SURPRISAL = tl.constexpr(128)  # with its entropy
SUM_LATER = tl.constexpr(256)  # survivors that no list holds are summed by another kernel
BY_MASS = tl.constexpr(512)  # a filter by mass is all there is, and decided with these sums
ADAPTORS_SHIFT = tl.constexpr(10)

# Where bounds lie in memory, in int64.
BOUNDS_CUT = tl.constexpr(0)
BOUNDS_MASS = tl.constexpr(1)
BOUNDS_GUARD = tl.constexpr(2)
BOUNDS_CUTOFF = tl.constexpr(3)
BOUNDS_CUTOFF_GUARD = tl.constexpr(4)
BOUNDS_BAND = tl.constexpr(5)
BOUNDS_CENTRE = tl.constexpr(6)  # its bits
BOUNDS_STATUS = tl.constexpr(7)
BOUNDS_TOTAL = tl.constexpr(8)  # the survivors' mass, and their number
BOUNDS_KEPT = tl.constexpr(9)
BOUNDS_SIZE = tl.constexpr(10)

# What is counted of a virtual row, in int64; its histograms follow.
MARK_LISTED = tl.constexpr(0)  # tokens that belong into its list
MARK_BINNED = tl.constexpr(1)  # programs that have put their tiles into bins
MARK_SUMMED = tl.constexpr(2)  # programs that have summed their survivors
MARK_STATE = tl.constexpr(3)
MARK_TIED = tl.constexpr(4)  # tokens of the level of its list or bracket
MARK_STAGE = tl.constexpr(6)
MARK_END = tl.constexpr(7)  # the bin in which its nucleus ends
MARK_ABOVE = tl.constexpr(8)  # the mass above its bracket
MARK_WITHIN = tl.constexpr(9)  # and in it, and the tokens there
MARK_BRACKETED = tl.constexpr(10)
MARK_LOW = tl.constexpr(11)  # places between which its bracket lies
MARK_HIGH = tl.constexpr(12)
MARK_UNDER_HIGH = tl.constexpr(13)  # how far some token is under the one and over the other
MARK_OVER_LOW = tl.constexpr(14)
MARK_NARROWED = tl.constexpr(15)  # programs that have taken part in a round
MARK_REACH = tl.constexpr(16)  # how far down its nucleus may reach: float32 bits
MARK_SPLIT = tl.constexpr(17)  # what becomes of its bracket after its bins
MARK_TARGET = tl.constexpr(18)  # the mass up to which its nucleus takes tokens
MARK_LARGEST = tl.constexpr(19)  # its largest scaled logit, and U / Z for typical: float32 bits
MARK_CENTRE = tl.constexpr(20)
MARK_FLOOR = tl.constexpr(21)  # of its list: float32 bits
MARKS = tl.constexpr(32)
ID_BITS = tl.constexpr(22)  # of a place, below its key: the longest row has 2^22 ids
UNLISTED = tl.constexpr(1 << 40)  # tokens of a list that was not made

# What becomes of a bracket; where it is 0, nothing.
TO_LIST = tl.constexpr(1)  # a list, with one from the floor up
TO_COUNT = tl.constexpr(2)  # too many tokens for a list: are they a level?

# Stages of a bracket, the tokens among which a nucleus ends.
NO_BRACKET = tl.constexpr(0)
BINNED = tl.constexpr(1)  # one bin
NARROWED = tl.constexpr(2)  # known by its places
FEW_ENOUGH = tl.constexpr(3)  # to be listed
BRACKET_LISTED = tl.constexpr(4)
ONE_KAPPA = tl.constexpr(5)  # nothing to choose from: equally typical tokens stay together
ONE_LEVEL = tl.constexpr(6)  # equal tokens, counted by block

# States of a virtual row.
DECIDED = tl.constexpr(0)
UNDECIDED = tl.constexpr(1)  # its list alone does not do
UNSUMMED = tl.constexpr(2)  # its bounds is known, the masses of its survivors are not


@triton.jit
def follow(PDL: tl.constexpr):
    """Waits for the kernel before this one, where it may begin earlier; so may the next one."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def has(asked, bit):
    """Whether a call asks for something."""
    return (asked & bit) > 0


@triton.jit
def knobs_of(packed, asked, virtual):
    """Returns the row of logits and the knobs, of (A, 14, 1 or N), of a virtual row.

    The first axis of a grid is of virtual rows.
    """
    number = asked >> ADAPTORS_SHIFT
    at, adaptor, rows = virtual, virtual * 0, tl.num_programs(0)
    if number > 1:
        at, rows = virtual // number, rows // number
        adaptor = virtual - at * number
    step = tl.where(has(asked, PER_ROW), rows, 1)
    first = packed + adaptor.to(tl.int64) * NUM_KNOBS * step
    first += tl.where(has(asked, PER_ROW), at, 0)
    return at, Knobs(first, step, asked & VLLM)


@triton.jit
def load_knob(knobs, knob):
    """Loads a knob of a row as float64."""
    return tl.load(knobs.first + knob * knobs.step)


@triton.jit
def inverse_of(temperature):
    """Returns fl32(1 / T); 1 where T is 0, undefined where it is out of range."""
    usable = (temperature > 0) & (temperature <= 3.4028234663852886e38)
    return tl.div_rn(1.0, tl.where(usable, temperature, temperature * 0 + 1).to(tl.float32))


@triton.jit
def is_neutral(knob, value):
    """Whether a knob filters nothing; false for NaN."""
    return tl.where((knob == TOP_P) | (knob == TYPICAL_P), value == 1, value == 0)


@triton.jit
def knobs_in_range(knobs):
    """Whether every knob of a row is in its range; NaN never is."""
    t = load_knob(knobs, TEMPERATURE)
    good = (t == 0) | ((t >= 1e-6) & (t <= 3.4028234663852886e38))
    good &= load_knob(knobs, TOP_K) >= 0
    top_p = load_knob(knobs, TOP_P)
    good &= (top_p >= 0) & (top_p <= 1)
    min_p = load_knob(knobs, MIN_P)
    good &= (min_p >= 0) & (min_p <= 1)
    typical_p = load_knob(knobs, TYPICAL_P)
    good &= (typical_p > 0) & (typical_p <= 1)
    epsilon = load_knob(knobs, EPSILON)
    good &= (epsilon >= 0) & (epsilon < 1)
    eta = load_knob(knobs, ETA)
    good &= (eta >= 0) & (eta < 1)
    return good & (load_knob(knobs, KEEP) >= 1)


@triton.jit
def filter_at(knobs, turn):
    """Returns the knob of the filter that runs at a turn, 0 to 5, in either order."""
    early = tl.where(turn == 0, MIN_P, turn)
    return tl.where((knobs.vllm == 1) & (turn < 3), early, turn + 1)


@triton.jit
def first_filter(knobs):
    """Returns the knob of the first filter that is not neutral, 0 if all are."""
    first = tl.full([], 0, tl.int32)
    for i in range(6):
        at = filter_at(knobs, i).to(tl.int32)
        active = is_neutral(at, load_knob(knobs, at)) == 0
        first = tl.where((first == 0) & active, at, first)
    return first


@triton.jit
def has_one_filter(knobs):
    """Whether exactly one filter is not neutral and no minimum of tokens is set."""
    number = tl.full([], 0, tl.int32)
    for i in range(1, 7):
        number += (is_neutral(i, load_knob(knobs, i)) == 0).to(tl.int32)
    return (number == 1) & (load_knob(knobs, KEEP) <= 1)


@triton.jit
def needs_masses(first):
    """Whether a row's first filter needs the mass of the whole row, as all but two do."""
    return (first == 0) | (first == TOP_P) | (first >= TYPICAL_P)


@triton.jit
def needs_surprisal(knobs):
    """Whether a filter of a row needs the entropy."""
    typical = load_knob(knobs, TYPICAL_P) != 1
    return typical | (load_knob(knobs, ETA) != 0)


@triton.jit
def largest_of(parts, SPLITS: tl.constexpr):
    """Returns the largest logit of a row from its parts, -0 as 0; NaN if one is."""
    j = tl.arange(0, SPLITS)
    part = tl.load(parts.largest + j, mask=j < parts.splits, other=float("-inf"))
    nan = tl.max((part != part).to(tl.int32), 0) > 0
    return tl.where(nan, float("nan"), tl.max(tl.where(part != part, float("-inf"), part), 0)) + 0.0


@triton.jit
def status_of(knobs, m):
    """Returns the status of a row whose largest scaled logit is m."""
    status = tl.where(m == float("-inf"), NOTHING_FINITE, OK)
    status = tl.where(m == float("inf"), POSITIVE_INF, status)
    status = tl.where(m != m, NAN, status)
    return tl.where(knobs_in_range(knobs), status, BAD_KNOB)


@triton.jit
def store_bounds(all_bounds, bounds, status):
    """Stores bounds and status of a row."""
    tl.store(all_bounds + BOUNDS_CUT, bounds.cut)
    tl.store(all_bounds + BOUNDS_MASS, bounds.mass)
    tl.store(all_bounds + BOUNDS_GUARD, bounds.guard)
    tl.store(all_bounds + BOUNDS_CUTOFF, bounds.cutoff)
    tl.store(all_bounds + BOUNDS_CUTOFF_GUARD, bounds.cutoff_guard)
    tl.store(all_bounds + BOUNDS_BAND, bounds.band)
    tl.store(all_bounds + BOUNDS_CENTRE, bounds.centre.to(tl.int32, bitcast=True).to(tl.int64))
    tl.store(all_bounds + BOUNDS_STATUS, status.to(tl.int64))


@triton.jit
def load_bounds(all_bounds):
    """Loads the bounds of a row."""
    return Bounds(
        tl.load(all_bounds + BOUNDS_CUT),
        tl.load(all_bounds + BOUNDS_MASS),
        tl.load(all_bounds + BOUNDS_GUARD),
        tl.load(all_bounds + BOUNDS_CUTOFF),
        tl.load(all_bounds + BOUNDS_CUTOFF_GUARD),
        tl.load(all_bounds + BOUNDS_BAND),
        tl.load(all_bounds + BOUNDS_CENTRE).to(tl.int32).to(tl.float32, bitcast=True),
    )


@triton.jit
def load_scaled(row, ids):
    """Loads the scaled logits of a row, -inf past its end."""
    x = tl.load(row.logits + ids, mask=ids < row.v, other=float("-inf"))
    return x.to(tl.float32) * row.inverse


@triton.jit
def length_of(tokens):
    """Returns how many tokens there are to look at."""
    return tl.where(tokens.number >= 0, tokens.number, tokens.row.v)


@triton.jit
def load_tokens(tokens, block, BLOCK: tl.constexpr):
    """Loads some tokens in turn: scaled logits, -inf past the end, and ids."""
    j = block * BLOCK + tl.arange(0, BLOCK)
    listed = tokens.number >= 0
    of_row = j < tl.where(listed, 0, tokens.row.v)
    x = tl.load(tokens.row.logits + j, mask=of_row, other=float("-inf"))
    there = j < tokens.number
    s = tl.load(tokens.list.s + j, mask=there, other=float("-inf"))
    ids = tl.load(tokens.list.ids + j, mask=there, other=0)
    s = tl.where(listed, s, x.to(tl.float32) * tokens.row.inverse)
    return s, tl.where(listed, ids, j)


@triton.jit
def load_list(held, number, LIST: tl.constexpr):
    """Loads a list: scaled logits, -inf past its end, and ids."""
    at = tl.arange(0, LIST)
    there = at < number
    s = tl.load(held.s + at, mask=there, other=float("-inf"))
    return s, tl.load(held.ids + at, mask=there, other=0)


@triton.jit
def marks_of(scratch, virtual):
    """Returns the address of the record of a virtual row, which begins with its counters."""
    return scratch.memory + virtual.to(tl.int64) * scratch.RECORD


@triton.jit
def parts_of(scratch, asked, at, v, sizes):
    """Returns the maxima of a row of logits."""
    record = marks_of(scratch, at * (asked >> ADAPTORS_SHIFT))
    real: tl.constexpr = tl.pointer_type(tl.float32)
    return Parts(
        (record + scratch.LARGEST).to(real),
        (record + scratch.SUPERS).to(real),
        (record + scratch.GROUPS).to(real),
        tl.cdiv(v, sizes.COLUMNS * sizes.GROUP),
    )


@triton.jit
def weights_of(scratch, asked, at, virtual, v, sizes):
    """Returns the masses of blocks of a virtual row, and those at temperature 1 of its row."""
    sums = marks_of(scratch, virtual) + scratch.SUMS
    base_sums = marks_of(scratch, at * (asked >> ADAPTORS_SHIFT)) + scratch.SUMS
    counts = (sums + 5 * sizes.BLOCKS).to(tl.pointer_type(tl.int32))
    return Weights(
        sums,
        sums + sizes.BLOCKS,
        base_sums + 2 * sizes.BLOCKS,
        base_sums + 3 * sizes.BLOCKS,
        sums + 4 * sizes.BLOCKS,
        counts,
        counts + sizes.BLOCKS,
        tl.cdiv(v, sizes.BLOCK),
    )


@triton.jit
def lists_of(scratch, virtual, sizes):
    """Returns the list of a virtual row's tokens from a floor up, and a spare one."""
    first = marks_of(scratch, virtual) + scratch.LISTS
    half: tl.constexpr = sizes.ROOM // 2  # of a list's int64, for logits and for ids
    real: tl.constexpr = tl.pointer_type(tl.float32)
    whole: tl.constexpr = tl.pointer_type(tl.int32)
    listed = List(first.to(real), (first + half).to(whole))
    return listed, List((first + 2 * half).to(real), (first + 3 * half).to(whole))


@triton.jit
def load_float(mark):
    """Loads a float32 from its counter."""
    return tl.load(mark).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def store_float(mark, value):
    """Stores a float32 in its counter."""
    tl.store(mark, value.to(tl.int32, bitcast=True).to(tl.int64))


@triton.jit
def hits_of(parts, tile, inverse, floor, COLUMNS: tl.constexpr):
    """Returns which groups of a tile reach a floor."""
    largest = tl.load(parts.groups + tile * COLUMNS + tl.arange(0, COLUMNS)) * inverse
    return (largest >= floor) & (largest > float("-inf"))


@triton.jit
def push(out, count, s, ids, good, ROOM: tl.constexpr):
    """Appends tokens to a list as far as there is room, and counts all of them."""
    many = tl.sum(good.to(tl.int32), 0)
    if many > 0:
        place = tl.cumsum(good.to(tl.int32), 0) - 1
        place += tl.atomic_add(count, many.to(tl.int64), sem="relaxed")
        good &= place < ROOM
        tl.store(out.s + place, s, mask=good)
        tl.store(out.ids + place, ids, mask=good)


@triton.jit
def append(out, count, row, ids, bits, number, COLUMNS: tl.constexpr, ROOM: tl.constexpr):
    """Appends the tokens of a tile that have a bit, one for each logit of a group, to a list."""
    many = tl.sum(number, 0)
    if many > 0:
        place = tl.cumsum(number, 0) - number
        place += tl.atomic_add(count, many.to(tl.int64), sem="relaxed").to(tl.int32)
        while tl.max(number, 0) > 0:
            lowest = bits & -bits
            # a power of two has its exponent where a float32 has it; of bit 31 the sign is set
            exponent = lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23
            here = ids + tl.where(number > 0, (exponent & 255) - 127, 0) * COLUMNS
            s = load_scaled(row, here)
            there = (number > 0) & (place < ROOM)
            tl.store(out.s + place, s, mask=there)
            tl.store(out.ids + place, here, mask=there)
            bits ^= lowest
            place += 1
            number -= 1


@triton.jit
def sums_of(weights, BLOCKS: tl.constexpr):
    """Returns mass and, if a filter needs it, surprisal mass of a weighed row."""
    j = tl.arange(0, BLOCKS)
    there = j < weights.blocks
    z = tl.sum(tl.load(weights.sums + j, mask=there, other=0), 0)
    return z, tl.sum(tl.load(weights.surprisal_sums + j, mask=there, other=0), 0)
