"""Finds the cut of a row: the last token, by rank, with less than a target before it.

A program holds a list of at most so many tokens; of longer ones, or of a row, it looks at some at a
time.

What comes before a token is the weight, a count or a mass, of the survivors of higher rank. Ranks
are unique integers, so a cut is one, and ties are part of it.
"""

import triton
import triton.language as tl

from fastadapt._ops.triton.arithmetic import (
    ANY_RANK,
    LAST_ID,
    MIN_INT32,
    NO_RANK,
    exponentials,
    keys,
    masses,
    ranks,
    survives,
    typicality,
    values,
)
from fastadapt._ops.triton.bundles import Found, Held, Tokens
from fastadapt._ops.triton.rows import (
    BINNED,
    BRACKET_LISTED,
    ID_BITS,
    KEEP,
    MARK_ABOVE,
    MARK_BRACKETED,
    MARK_FLOOR,
    MARK_LISTED,
    MARK_LOW,
    MARK_STAGE,
    MARK_TIED,
    MARK_WITHIN,
    ONE_KAPPA,
    ONE_LEVEL,
    UNLISTED,
    length_of,
    lists_of,
    load_float,
    load_knob,
    load_list,
    load_scaled,
    load_tokens,
    marks_of,
)

SLACK = tl.constexpr(1e-3)  # of masses told from counts, over 1e-4 that rounding takes


@triton.jit
def look(s, ids, m, bounds, by_kappa, by_mass):
    """Returns survivors, key, rank, distance (d or -kappa) and weight of tokens."""
    d = s - m
    alive = survives(s, ids, m, bounds)
    q = tl.where(by_kappa, typicality(d, bounds.centre), d)
    key = keys(tl.where(by_kappa, q, s))
    weight = tl.where(by_mass, exponentials(d), 1.0).to(tl.int64)
    return alive, key, ranks(key, ids), q, tl.where(alive, weight, 0)


@triton.jit
def last_before(rank, weight, alive, above, target):
    """Finds the cut among loaded tokens, with a given weight above all of them."""
    low = tl.min(tl.where(alive, rank, NO_RANK), 0)
    high = tl.max(tl.where(alive, rank, ANY_RANK), 0)
    best = tl.sum(tl.where(rank == high, weight, 0), 0)
    low = tl.where(above + best >= target, high, low)
    left = tl.sum((alive & (rank >= low)).to(tl.int32), 0)
    while left > 1:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        before = above + tl.sum(tl.where(rank > middle, weight, 0), 0)
        low = tl.where(before < target, low, middle + 1)
        high = tl.where(before < target, middle, high)
        left = tl.sum((alive & (rank >= low) & (rank <= high)).to(tl.int32), 0)
    return tl.max(tl.where(alive & (rank >= low) & (rank <= high), rank, ANY_RANK), 0)


@triton.jit
def first_ranks(rank, weight, alive, above, target):
    """Finds the cut among tokens that are sorted by rank, the best first."""
    before = above + tl.cumsum(weight, 0) - weight
    return tl.min(tl.where(alive & (before < target), rank, NO_RANK), 0)


@triton.jit
def _bin_of(key, q, best_key, worst_key, q_high, q_low, linear, BINS: tl.constexpr):
    """Returns bins of equal width in q or, where that fails, in keys; the first is the best."""
    if linear:
        by_q = (q_high - q) * (BINS / (q_high - q_low))
        chosen = tl.minimum(tl.maximum(by_q, 0.0), BINS - 1.0).to(tl.int32)
    else:  # a division of integers for each token
        width = best_key.to(tl.int64) - worst_key.to(tl.int64) + 1
        chosen = (((best_key.to(tl.int64) - key) * BINS) // width).to(tl.int32)
    return chosen


@triton.jit
def _bracket(
    histogram, need, q_high, q_low, linear, first, by_kappa, by_mass, centre, BINS: tl.constexpr
):
    """Returns the bins between which the cut lies, by the masses that they can have."""
    j = tl.arange(0, BINS).to(tl.float32)[None, :]
    upper_side = (tl.arange(0, 2) == 1)[:, None]
    width = (q_high - q_low) / BINS
    q_best = tl.where(linear, q_high - j * width, q_high)
    q_worst = tl.where(linear, q_high - (j + 1.0) * width, q_low)
    q_worst = tl.where(j == tl.where(first, BINS - 1, BINS), float("-inf"), q_worst)
    # of a distance -kappa, d is -centre - kappa, or on the upper side -centre + kappa
    d_most = tl.where(upper_side, tl.minimum(-centre - q_worst, 0.0), q_best - centre)
    d_least = tl.where(upper_side, -centre - q_best, q_worst - centre)
    d_most = tl.where(by_kappa, d_most, q_best)
    d_least = tl.where(by_kappa, d_least, q_worst)
    most = tl.exp(d_most) * 1.099511627776e12 * (1.0 + SLACK) + 1.0
    least = tl.maximum(tl.exp(d_least) * 1.099511627776e12 * (1.0 - SLACK) - 1.0, 0.0)
    number = tl.reshape(histogram, (2, BINS)).to(tl.float32)
    most = tl.cumsum(tl.sum(number * tl.where(by_mass, most, 1.0), 0), 0)
    least = tl.cumsum(tl.sum(number * tl.where(by_mass, least, 1.0), 0), 0)
    slack = tl.where(by_mass, SLACK, 0.0)
    begin = tl.sum((most * (1.0 + slack) < need).to(tl.int32), 0)
    end = tl.sum((least * (1.0 - slack) < need).to(tl.int32), 0)
    end = tl.minimum(end, BINS - 1)
    return tl.minimum(begin, end), end, tl.sum(tl.reshape(histogram, (2, BINS)), 0)


@triton.jit
def _number_in(number, begin, end, BINS: tl.constexpr):
    """Returns the number of tokens in a range of bins."""
    j = tl.arange(0, BINS)
    return tl.sum(tl.where((j >= begin) & (j <= end), number, 0), 0)


@triton.jit
def _tied_cut(row, bounds, by_kappa, key, wanted, BLOCK: tl.constexpr):
    """Returns the rank of the n-th survivor, by id, among those with one key."""
    running = tl.full([], 0, tl.int64)
    answer = tl.full([], LAST_ID, tl.int32)
    for block in range(tl.cdiv(row.v, BLOCK)):
        ids = block * BLOCK + tl.arange(0, BLOCK)
        s = load_scaled(row, ids)
        alive, here, _, _, _ = look(s, ids, row.m, bounds, by_kappa, by_kappa)
        hit = alive & (here == key)
        number = tl.cumsum(hit.to(tl.int32), 0)
        found = hit & (running + number == wanted)
        answer = tl.minimum(answer, tl.min(tl.where(found, ids, LAST_ID), 0))
        running += tl.max(number, 0)
    return ranks(key, answer)


@triton.jit
def cut_among(
    tokens, bounds, by_kappa, by_mass, target, spare,
    BLOCK: tl.constexpr, LIST: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Finds the cut among tokens that no program holds: counts by bin bracket it, sums decide it.

    Two passes part all from the few thousand tokens around it, unless many are almost equal; the
    tokens that are left are looked at together. All of one key are cut by id.
    """
    row, blocks = tokens.row, tl.cdiv(length_of(tokens), BLOCK)
    above = tl.full([], 0, tl.int64)
    best_key = tl.full([], 2**31 - 1, tl.int32)
    worst_key = tl.full([], MIN_INT32, tl.int32)
    q_high = row.m * 0.0
    q_low = q_high - 32.0
    first = True
    inside = tl.full([], LIST + 1, tl.int32)
    while (inside > LIST) & (worst_key < best_key):
        span = q_high - q_low
        linear = first | ((span > 1e-30) & (span < 1e30))
        histogram = tl.zeros([2 * BINS], tl.int32)
        for block in range(blocks):
            s, ids = load_tokens(tokens, block, BLOCK)
            alive, key, _, q, _ = look(s, ids, row.m, bounds, by_kappa, by_mass)
            alive &= (key >= worst_key) & (key <= best_key)
            b = _bin_of(key, q, best_key, worst_key, q_high, q_low, linear, BINS)
            b += tl.where(s - row.m + bounds.centre > 0, tl.where(by_kappa, BINS, 0), 0)
            histogram += tl.histogram(tl.where(alive, b, 0), 2 * BINS, mask=alive)
        need = (target - above).to(tl.float32)
        begin, end, number = _bracket(
            histogram, need, q_high, q_low, linear, first, by_kappa, by_mass, bounds.centre, BINS
        )
        # where the bounds leave too much, exact sums halve the bins
        while (end > begin) & (_number_in(number, begin, end, BINS) > LIST):
            middle = (begin + end + 1) // 2
            best = tl.zeros([BLOCK], tl.int64)
            for block in range(blocks):
                s, ids = load_tokens(tokens, block, BLOCK)
                alive, key, _, q, weight = look(s, ids, row.m, bounds, by_kappa, by_mass)
                alive &= (key >= worst_key) & (key <= best_key)
                b = _bin_of(key, q, best_key, worst_key, q_high, q_low, linear, BINS)
                best += tl.where(alive & (b < middle), weight, 0)
            reached = above + tl.sum(best, 0) >= target
            end = tl.where(reached, middle - 1, end)
            begin = tl.where(reached, begin, middle)
        over = tl.zeros([BLOCK], tl.int64)
        most_key = tl.full([BLOCK], MIN_INT32, tl.int32)
        least_key = tl.full([BLOCK], 2**31 - 1, tl.int32)
        filled = tl.full([], 0, tl.int32)
        tl.debug_barrier()  # the spare list may still be read
        for block in range(blocks):
            s, ids = load_tokens(tokens, block, BLOCK)
            alive, key, _, q, weight = look(s, ids, row.m, bounds, by_kappa, by_mass)
            alive &= (key >= worst_key) & (key <= best_key)
            b = _bin_of(key, q, best_key, worst_key, q_high, q_low, linear, BINS)
            over += tl.where(alive & (b < begin), weight, 0)
            within = alive & (b >= begin) & (b <= end)
            most_key = tl.maximum(most_key, tl.where(within, key, MIN_INT32))
            least_key = tl.minimum(least_key, tl.where(within, key, 2**31 - 1))
            place = filled + tl.cumsum(within.to(tl.int32), 0)
            filled = tl.max(place, 0)
            within &= place <= LIST
            tl.store(spare.s + place - 1, s, mask=within)
            tl.store(spare.ids + place - 1, ids, mask=within)
        above += tl.sum(over, 0)
        inside = filled
        best_key, worst_key = tl.max(most_key, 0), tl.min(least_key, 0)
        origin = tl.where(by_kappa, 0.0, row.m)
        q_high, q_low = values(best_key) - origin, values(worst_key) - origin
        first = False
    if inside <= LIST:
        tl.debug_barrier()
        s, ids = load_list(spare, inside, LIST)
        alive, _, rank, _, weight = look(s, ids, row.m, bounds, by_kappa, by_mass)
        # what is past the end is -inf, which bounds may let survive
        there = tl.arange(0, LIST) < inside
        cut = last_before(rank, tl.where(there, weight, 0), alive & there, above, target)
    else:
        each = tl.where(by_mass, tl.maximum(masses(q_high), 1), 1)
        wanted = (target - above + each - 1) // each
        # of equally typical tokens a mass keeps all, whichever is found here
        wanted = tl.where(by_mass & by_kappa, 1, wanted)
        cut = _tied_cut(row, bounds, by_kappa, best_key, wanted, BLOCK)
    return cut


@triton.jit
def held_of(scratch, virtual, knobs, sizes):
    """Chooses the list of a virtual row to work on, and says whether it fits one program.

    The list from its floor up, or where a program cannot hold that, the list of its bracket, which
    decides its first filter.
    """
    marks = marks_of(scratch, virtual)
    counted = tl.load(marks + MARK_LISTED)
    listed = tl.minimum(counted, 2**30).to(tl.int32)
    stage = tl.load(marks + MARK_STAGE).to(tl.int32)
    bracketed = tl.minimum(tl.load(marks + MARK_BRACKETED), 2**31 - 1).to(tl.int32)
    one = stage == ONE_KAPPA
    bracketed = tl.where(one, 0, bracketed)
    few = ((stage == BINNED) & (bracketed <= sizes.ROOM)) | (stage >= BRACKET_LISTED)
    # a minimum of tokens takes a cut of its own, which needs more than the bracket
    partial = few & (bracketed <= sizes.LIST) & (load_knob(knobs, KEEP) <= 1)
    partial &= listed > sizes.LIST
    key = (tl.load(marks + MARK_LOW) >> ID_BITS).to(tl.int32)
    tied = tl.load(marks + MARK_TIED).to(tl.int32)
    listed += (tied > 0).to(tl.int32)
    # a level is an entry only of a list that a program holds
    room = tl.where(tied > 0, sizes.LIST, sizes.ROOM)
    return Held(
        tl.where(partial, bracketed, listed),
        partial,
        tl.where(listed <= room, listed, -1),
        partial & (counted >= UNLISTED) & ((stage == BINNED) | (stage == ONE_LEVEL)),
        tl.load(marks + MARK_ABOVE),
        tl.load(marks + MARK_WITHIN),
        one,
        ranks(key, key * 0),
        tied,
    )


@triton.jit
def load_held(held, listed, spare, floor, sizes):
    """Loads the chosen list: scaled logits and ids, of a level those of a token with id 0."""
    s, ids = load_list(listed, tl.where(held.partial, 0, held.number), sizes.LIST)
    if held.tied > 0:  # of a bracket it is all
        level = tl.arange(0, sizes.LIST) == held.number - 1
        s, ids = tl.where(level, floor, s), tl.where(level, 0, ids)
    elif held.partial:
        s, ids = load_list(spare, held.number, sizes.LIST)
    return s, ids


@triton.jit
def found_of(scratch, virtual, held, sizes):
    """Loads the list of a virtual row, with the address of a spare one."""
    listed, spare = lists_of(scratch, virtual, sizes)
    floor = load_float(marks_of(scratch, virtual) + MARK_FLOOR)
    s, ids = floor, held.number
    if sizes.ALONE:
        s = tl.full([sizes.LIST], float("-inf"), tl.float32)
        ids = tl.zeros([sizes.LIST], tl.int32)
        if held.number > 0:
            s, ids = load_held(held, listed, spare, floor, sizes)
            there = tl.arange(0, sizes.LIST) < held.number
            rank = tl.sort(tl.where(there, ranks(keys(s), ids), ANY_RANK), descending=True)
            s = tl.where(there, values((rank >> 32).to(tl.int32)), float("-inf"))
            ids = tl.where(there, LAST_ID - (rank & 0xFFFFFFFF).to(tl.int32), 0)
    return Found(held, floor, s, ids, listed, spare)


@triton.jit
def tokens_of(found, tied, sizes):
    """Returns scaled logits and ids of a list; an unsorted one is loaded anew for each use.

    Without tokens its level is -inf.
    """
    s, ids = found.s, found.ids
    if sizes.ALONE == 0:  # else the kernel would hold more than it has registers for
        s, ids = load_held(found.held, found.listed, found.spare, found.floor, sizes)
    if (found.held.tied > 0) & (tied == 0):
        level = tl.arange(0, sizes.LIST) == found.held.number - 1
        s = tl.where(level, float("-inf"), s)
    return s, ids


@triton.jit
def copied(weight, found, tied, sizes):
    """Returns weights of a list's entries, that of its level times its tokens."""
    if found.held.tied > 0:
        level = tl.arange(0, sizes.LIST) == found.held.number - 1
        weight = tl.where(level, weight * tied, weight)
    return weight


@triton.jit
def is_held(held, sizes):
    """Whether a program holds the whole list."""
    return (held.number <= sizes.LIST) & (held.partial == 0)


@triton.jit
def _near(q, found, row, bounds, by_kappa, whole):
    """Whether all tokens that are as good as these are in the list.

    As typical as the floor, below the centre, may also be others.
    """
    edge = found.floor - row.m + bounds.centre
    limit = tl.where(edge < 0.0, keys(edge), 2**31 - 1)
    return keys(q) > tl.where(whole | (by_kappa == 0), MIN_INT32, limit)


@triton.jit
def _listed_weight(tokens, bounds, by_kappa, by_mass, found, BLOCK: tl.constexpr):
    """Sums the weights of the survivors that outrank all that is not listed."""
    total = tl.full([], 0, tl.int64)
    for block in range(tl.cdiv(tokens.number, BLOCK)):
        s, ids = load_tokens(tokens, block, BLOCK)
        _, _, _, q, weight = look(s, ids, tokens.row.m, bounds, by_kappa, by_mass)
        near = _near(q, found, tokens.row, bounds, by_kappa, total < 0)
        total += tl.sum(tl.where(near, weight, 0), 0)
    return total


@triton.jit
def cut_of(row, bounds, by_kappa, by_mass, target, found, inside, tied, partial, sizes):
    """Finds a cut in a list, and says whether the list was enough to decide it."""
    cut = tl.full([], 0, tl.int64)
    above = tl.where(partial, found.held.above, 0)
    usable = is_held(found.held, sizes) | partial
    if usable:
        s, ids = tokens_of(found, tied, sizes)
        alive, _, rank, q, weight = look(s, ids, row.m, bounds, by_kappa, by_mass)
        near = _near(q, found, row, bounds, by_kappa, inside | partial)
        alive &= near
        weight = tl.where(near, copied(weight, found, tied, sizes), 0)
        usable = inside | partial | (tl.sum(weight, 0) >= target)
        if usable:
            if sizes.ALONE:
                if by_kappa:
                    cut = last_before(rank, weight, alive, above, target)
                else:
                    cut = first_ranks(rank, weight, alive, above, target)
            else:
                cut = last_before(rank, weight, alive, above, target)
            cut = tl.where(partial & found.held.one, found.held.rank, cut)
    lost = usable == 0
    enough = usable & (found.held.whole >= 0)
    if sizes.ALONE == 0:
        if lost:
            tokens = Tokens(row, found.listed, found.held.whole)
            enough = (found.held.whole >= 0) & (is_held(found.held, sizes) == 0)
            if enough & (inside == 0):
                reached = _listed_weight(tokens, bounds, by_kappa, by_mass, found, sizes.STEP)
                enough = reached >= target
            tokens = Tokens(row, found.listed, tl.where(enough, found.held.whole, -1))
            cut = cut_among(
                tokens, bounds, by_kappa, by_mass, target, found.spare,
                sizes.STEP, sizes.LIST, sizes.BINS,
            )  # fmt: skip
    return cut, enough, lost
