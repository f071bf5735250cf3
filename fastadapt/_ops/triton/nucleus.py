"""Finds where the nucleus of a whole row ends, for top-p and typical, with many programs a row.

Masses are summed by bins of d, the distance to the maximum, or of kappa; the bin in which the
nucleus ends is its bracket: few tokens, mostly. Where they are many, as on flat rows, rounds of
finer bins narrow it, by their keys and then by their ids.
"""

import triton
import triton.language as tl

from fastadapt._ops.triton.arithmetic import exponentials, keys, log64, masses, typicality
from fastadapt._ops.triton.bundles import Bracket, Row, row_at
from fastadapt._ops.triton.rows import (
    BINNED,
    BRACKET_LISTED,
    FEW_ENOUGH,
    ID_BITS,
    MARK_ABOVE,
    MARK_BINNED,
    MARK_BRACKETED,
    MARK_CENTRE,
    MARK_END,
    MARK_FLOOR,
    MARK_HIGH,
    MARK_LARGEST,
    MARK_LISTED,
    MARK_LOW,
    MARK_NARROWED,
    MARK_OVER_LOW,
    MARK_REACH,
    MARK_SPLIT,
    MARK_STAGE,
    MARK_TARGET,
    MARK_UNDER_HIGH,
    MARK_WITHIN,
    MARKS,
    NARROWED,
    NO_BRACKET,
    ONE_KAPPA,
    TEMPERATURE,
    TO_COUNT,
    TO_LIST,
    TOP_P,
    TYPICAL_P,
    UNLISTED,
    first_filter,
    follow,
    has_one_filter,
    hits_of,
    inverse_of,
    knobs_of,
    lists_of,
    load_float,
    load_knob,
    load_scaled,
    marks_of,
    parts_of,
    push,
    store_float,
)

UNIT = tl.constexpr(1.099511627776e12)  # 2^40
LAST_PLACE = tl.constexpr((1 << 22) - 1)
FEW_HITS = tl.constexpr(32)  # tokens that are added to their bins one by one


@triton.jit
def reach_of(value, z, v, centre, by_kappa):
    """Returns how far below 0, in d or -kappa, tokens can matter to a nucleus of a given mass.

    All tokens below that d together have less than half of the mass that is left out.
    """
    left_out = (1.0 - value) * z.to(tl.float64) / (2.0 * UNIT)
    left_out = left_out / tl.cast(v, tl.float64)  # an argument that is 1 has no `to`
    d = log64(tl.maximum(left_out, 1e-13)).to(tl.float32)  # at least -30: masses end at -28
    return tl.where(by_kappa, tl.maximum(centre, -d - centre), -d)


@triton.jit
def nucleus_of(scratch, virtual, knobs):
    """Returns what top-p or typical needs: 1 / T, m, the target, and the bracket so far."""
    marks = marks_of(scratch, virtual)
    stage, end = tl.load(marks + MARK_STAGE).to(tl.int32), tl.load(marks + MARK_END).to(tl.int32)
    by_kappa = first_filter(knobs) == TYPICAL_P
    centre, reach = load_float(marks + MARK_CENTRE), load_float(marks + MARK_REACH)
    bracket = Bracket(stage, by_kappa, centre, reach, end)
    inverse = inverse_of(load_knob(knobs, TEMPERATURE))
    return inverse, load_float(marks + MARK_LARGEST), tl.load(marks + MARK_TARGET), bracket


@triton.jit
def _bin_of(d, bracket, BINS: tl.constexpr):
    """Returns the bin of each token, and which tokens have one."""
    below = tl.where(bracket.by_kappa, -typicality(d, bracket.centre), -d)
    hit = below < bracket.reach
    scaled = tl.where(hit, below, 0.0) * (BINS / bracket.reach)
    return tl.minimum(scaled, BINS - 1.0).to(tl.int32), hit


@triton.jit
def around(d, bracket, BINS: tl.constexpr):
    """Returns which tokens are above the bin in which the nucleus ends, and which are in it."""
    b, hit = _bin_of(d, bracket, BINS)
    return hit & (b < bracket.end), hit & (b == bracket.end)


@triton.jit
def _add_by_bin(sums, counts, b, value, hit, COUNTS: tl.constexpr):
    """Adds weights to bins, and counts; tokens of one bin are summed first, for tied rows."""
    left = tl.sum(hit.to(tl.int32), 0)
    while left > 0:
        most = tl.max(tl.where(hit, b, -1), 0)
        same = hit & (b == most)
        many = tl.sum(same.to(tl.int32), 0)
        if (many * 8 >= left) & (left > FEW_HITS):
            tl.atomic_add(sums + most, tl.sum(tl.where(same, value, 0), 0), sem="relaxed")
            if COUNTS:
                tl.atomic_add(counts + most, many.to(tl.int64), sem="relaxed")
            hit = hit & (b != most)
            left -= many
        else:
            tl.atomic_add(sums + b, value, mask=hit, sem="relaxed")
            if COUNTS:
                tl.atomic_add(counts + b, hit.to(tl.int64), mask=hit, sem="relaxed")
            left = left * 0


@triton.jit
def _flush(sums, counts, run, total, number, COUNTS: tl.constexpr):
    """Adds what was summed for one bin."""
    if run >= 0:
        tl.atomic_add(sums + run, tl.sum(total, 0), sem="relaxed")
        if COUNTS:
            tl.atomic_add(counts + run, tl.sum(number, 0).to(tl.int64), sem="relaxed")


@triton.jit
def _add_in_runs(
    sums, counts, b, value, hit, run, total, number, BINS: tl.constexpr, COUNTS: tl.constexpr
):
    """Adds weights to bins; while all tokens are of one bin, they are summed where they are."""
    first, last = tl.min(tl.where(hit, b, BINS), 0), tl.max(tl.where(hit, b, -1), 0)
    if first == last:
        if first != run:
            _flush(sums, counts, run, total, number, COUNTS)
            total, number = total * 0, number * 0
        run = first
        total += tl.where(hit, value, 0)
        number += hit.to(tl.int32)
    else:
        _add_by_bin(sums, counts, b, value, hit, COUNTS)
    return run, total, number


@triton.jit
def _store_bracket(marks, target, bracket, BINS: tl.constexpr):
    """Finds the bin in which a nucleus ends, BINS if in none, and the mass above it."""
    j = tl.arange(0, BINS)
    # summed by atomic additions, of which a first-level cache may not know
    mass = tl.load(marks + MARKS + j, cache_modifier=".cg")
    end = tl.sum((tl.cumsum(mass, 0) < target).to(tl.int32), 0)
    if end < BINS:
        tl.store(marks + MARK_END, end.to(tl.int64))
        tl.store(marks + MARK_ABOVE, tl.sum(tl.where(j < end, mass, 0), 0))
        tl.store(marks + MARK_WITHIN, tl.sum(tl.where(j == end, mass, 0), 0))
        tl.store(marks + MARK_STAGE, tl.full([], 0, tl.int64) + BINNED)
    return Bracket(bracket.stage, bracket.by_kappa, bracket.centre, bracket.reach, end)


@triton.jit
def _end_bins(marks, v, m, target, bracket, alone, BINS: tl.constexpr, ROOM: tl.constexpr):
    """Finds the bracket of a row from its bins, and the floor under it."""
    bracket = _store_bracket(marks, target, bracket, BINS)
    end = bracket.end
    width = bracket.reach / BINS
    edge = (end + 1).to(tl.float32) * width * 1.00001 + tl.abs(m) * 3e-7
    floor = tl.where((end < BINS) & (v > ROOM), m - edge - bracket.centre, float("-inf"))
    store_float(marks + MARK_FLOOR, floor)
    # a bin with the mass of more tokens than a list has room for
    nearest = end.to(tl.float32) * width * 0.9999
    above = tl.minimum((end + 1).to(tl.float32) * width * 1.0001 - bracket.centre, 0.0)
    one_side = (bracket.by_kappa == 0) | (nearest > bracket.centre)  # no d is above 0
    best = tl.where(one_side, -nearest - bracket.centre, above)
    least = exponentials(best + 1e-4).to(tl.float64) * ROOM
    here = tl.load(marks + MARK_WITHIN).to(tl.float64)
    crowded = (here > least) & (v > ROOM) & (end < BINS)
    again = (end < BINS) & (crowded == 0)
    nothing = tl.full([], 0, tl.int64)
    way = tl.where(again, TO_LIST, 0) + tl.where(crowded & alone, TO_COUNT, 0)
    tl.store(marks + MARK_SPLIT, way.to(tl.int64))
    tl.store(marks + MARK_LISTED, tl.where(again, nothing, nothing + UNLISTED))
    tl.store(marks + MARK_BRACKETED, tl.where(again, nothing, nothing + UNLISTED))


@triton.jit(do_not_specialize=["packed", "asked"])
def bins_kernel(rows, packed, asked, scratch, sizes, STEP: tl.constexpr, PDL: tl.constexpr):
    """Sums masses by bins for rows that begin with top-p or typical and have no list.

    Whoever is last of a row finds its bracket, and a floor for its list.
    """
    follow(PDL)
    virtual, part = tl.program_id(0), tl.program_id(1)
    at, knobs = knobs_of(packed, asked, virtual)
    first = first_filter(knobs)
    marks = marks_of(scratch, virtual)
    lost = (first == TOP_P) & (tl.load(marks + MARK_LISTED) > sizes.ROOM)
    lost |= first == TYPICAL_P
    # a sketch may have said which bin it is
    lost &= tl.load(marks + MARK_STAGE) == NO_BRACKET
    if (load_knob(knobs, TEMPERATURE) > 0) & lost:
        inverse, m, target, bracket = nucleus_of(scratch, virtual, knobs)
        lowest = m - bracket.reach - bracket.centre - 1e-4 - tl.abs(m) * 3e-7
        row = Row(row_at(rows, at), rows.v, inverse, m)
        run = tl.full([], -1, tl.int32)
        total, number = tl.zeros([STEP], tl.int64), tl.zeros([STEP], tl.int32)
        parts = parts_of(scratch, asked, at, rows.v, sizes)
        TILE: tl.constexpr = sizes.COLUMNS * sizes.GROUP
        for tile in range(part, parts.splits, tl.num_programs(1)):
            hit_groups = hits_of(parts, tile, inverse, lowest, sizes.COLUMNS)
            if tl.max(hit_groups.to(tl.int32), 0) > 0:
                for i in range(0, TILE, STEP):
                    ids = tile * TILE + i + tl.arange(0, STEP)
                    d = load_scaled(row, ids) - m
                    mass = masses(d)
                    b, hit = _bin_of(d, bracket, sizes.BINS)
                    run, total, number = _add_in_runs(
                        marks + MARKS, marks, b, mass, hit & (mass > 0), run, total, number,
                        sizes.BINS, False,
                    )  # fmt: skip
        _flush(marks + MARKS, marks, run, total, number, False)
        tl.debug_barrier()
        if tl.atomic_add(marks + MARK_BINNED, 1, sem="acq_rel") == tl.num_programs(1) - 1:
            alone = has_one_filter(knobs)
            _end_bins(marks, rows.v, m, target, bracket, alone, sizes.BINS, sizes.ROOM)


@triton.jit(do_not_specialize=["packed", "asked"])
def bracket_kernel(
    rows, packed, asked, scratch, sizes,
    STEP: tl.constexpr,
    SHORT: tl.constexpr,  # a list that needs none
    PDL: tl.constexpr,
):  # fmt: skip
    """Finds the bracket of a row that begins with top-p and has a list, and lists it apart."""
    follow(PDL)
    virtual = tl.program_id(0)
    at, knobs = knobs_of(packed, asked, virtual)
    marks = marks_of(scratch, virtual)
    length = tl.load(marks + MARK_LISTED)
    many = (length > SHORT) & (length <= sizes.ROOM) & (load_knob(knobs, TEMPERATURE) > 0)
    if many & (first_filter(knobs) == TOP_P):
        inverse, m, target, bracket = nucleus_of(scratch, virtual, knobs)
        number = length.to(tl.int32)
        listed, spare = lists_of(scratch, virtual, sizes)
        for i in range(0, number, STEP):
            j = i + tl.arange(0, STEP)
            d = tl.load(listed.s + j, mask=j < number, other=float("-inf")) - m
            mass = masses(d)
            b, hit = _bin_of(d, bracket, sizes.BINS)
            tl.atomic_add(marks + MARKS + b, mass, mask=hit & (mass > 0), sem="relaxed")
        tl.debug_barrier()
        bracket = _store_bracket(marks, target, bracket, sizes.BINS)
        if bracket.end < sizes.BINS:
            filled = tl.full([], 0, tl.int32)
            for i in range(0, number, STEP):
                j = i + tl.arange(0, STEP)
                s = tl.load(listed.s + j, mask=j < number, other=float("-inf"))
                ids = tl.load(listed.ids + j, mask=j < number, other=0)
                _, within = around(s - m, bracket, sizes.BINS)
                place = filled + tl.cumsum(within.to(tl.int32), 0) - 1
                filled += tl.sum(within.to(tl.int32), 0)
                tl.store(spare.s + place, s, mask=within)
                tl.store(spare.ids + place, ids, mask=within)
            tl.store(marks + MARK_BRACKETED, filled.to(tl.int64))


@triton.jit
def _places(q, ids, by_kappa):
    """Returns key and id in the order of ranks; equally typical tokens share one place."""
    own = tl.where(by_kappa, 0, LAST_PLACE - ids)
    return (keys(q).to(tl.int64) << ID_BITS) + own


@triton.jit(do_not_specialize=["packed", "asked"])
def narrow_kernel(rows, packed, asked, scratch, sizes, STEP: tl.constexpr, PDL: tl.constexpr):
    """Narrows a bracket too large for a list: finer bins, or in the end the list."""
    follow(PDL)
    virtual, part = tl.program_id(0), tl.program_id(1)
    marks = marks_of(scratch, virtual)
    stage = tl.load(marks + MARK_STAGE).to(tl.int32)
    bracketed = tl.load(marks + MARK_BRACKETED)
    active = (stage == NARROWED) | (stage == FEW_ENOUGH)
    listed = tl.load(marks + MARK_LISTED)
    active |= (stage == BINNED) & (bracketed > sizes.ROOM) & (listed > sizes.ROOM)
    if active:
        at, knobs = knobs_of(packed, asked, virtual)
        inverse, m, target, bracket = nucleus_of(scratch, virtual, knobs)
        row = Row(row_at(rows, at), rows.v, inverse, m)
        low, high = tl.load(marks + MARK_LOW), tl.load(marks + MARK_HIGH)
        if stage == BINNED:  # about where the bin is; which tokens are in it, `around` says
            width = bracket.reach / sizes.BINS
            origin = tl.where(bracket.by_kappa, 0.0, m)
            slack = tl.where(bracket.by_kappa, 1e-6, tl.abs(m) * 3e-7)
            top = origin - bracket.end.to(tl.float32) * width * 0.99999 + slack
            bottom = origin - (bracket.end + 1).to(tl.float32) * width * 1.00001 - slack
            high = (keys(tl.minimum(top, origin)).to(tl.int64) << ID_BITS) + LAST_PLACE
            low = keys(bottom).to(tl.int64) << ID_BITS
        shift = tl.full([], 0, tl.int64)
        while ((high - low) >> shift) >= sizes.BINS:
            shift += 1
        in_mass, in_count = marks + MARKS + sizes.BINS, marks + MARKS + 2 * sizes.BINS
        spare = lists_of(scratch, virtual, sizes)[1]
        under, over = high * 0, high * 0
        run = tl.full([], -1, tl.int32)
        total, number = tl.zeros([STEP], tl.int64), tl.zeros([STEP], tl.int32)
        for step in range(part, tl.cdiv(rows.v, STEP), tl.num_programs(1)):
            ids = step * STEP + tl.arange(0, STEP)
            s = load_scaled(row, ids)
            d = s - m
            mass = masses(d)
            q = tl.where(bracket.by_kappa, typicality(d, bracket.centre), s)
            place = _places(q, ids, bracket.by_kappa)
            hit = (place >= low) & (place <= high) & (mass > 0)
            if stage == BINNED:
                _, within = around(d, bracket, sizes.BINS)
                hit &= within
            if stage == FEW_ENOUGH:
                push(spare, marks + MARK_BRACKETED, s, ids, hit, sizes.ROOM)
            else:
                b = tl.minimum(tl.maximum((high - place) >> shift, 0), sizes.BINS - 1).to(tl.int32)
                run, total, number = _add_in_runs(
                    in_mass, in_count, b, mass, hit, run, total, number, sizes.BINS, True
                )
                under = tl.maximum(under, tl.max(tl.where(hit, high - place, 0), 0))
                over = tl.maximum(over, tl.max(tl.where(hit, place - low, 0), 0))
        _flush(in_mass, in_count, run, total, number, True)
        if under + over > 0:
            tl.atomic_max(marks + MARK_UNDER_HIGH, under, sem="relaxed")
            tl.atomic_max(marks + MARK_OVER_LOW, over, sem="relaxed")
        tl.debug_barrier()
        if tl.atomic_add(marks + MARK_NARROWED, 1, sem="acq_rel") == tl.num_programs(1) - 1:
            next_stage = tl.full([], 0, tl.int32) + BRACKET_LISTED
            if stage != FEW_ENOUGH:
                j = tl.arange(0, sizes.BINS)
                mass, count = tl.load(in_mass + j), tl.load(in_count + j)
                above = tl.load(marks + MARK_ABOVE)
                running = above + tl.cumsum(mass, 0)
                b = tl.sum((running < target).to(tl.int32), 0)
                here = tl.sum(tl.where(j == b, count, 0), 0)
                # no token lies beyond the least and the largest place seen
                new_high = high - (b.to(tl.int64) << shift)
                new_low = new_high - ((tl.full([], 1, tl.int64) << shift) - 1)
                least = high - tl.load(marks + MARK_UNDER_HIGH)
                most = low + tl.load(marks + MARK_OVER_LOW)
                new_high, new_low = tl.minimum(new_high, most), tl.maximum(new_low, least)
                tl.store(marks + MARK_ABOVE, above + tl.sum(tl.where(j < b, mass, 0), 0))
                tl.store(marks + MARK_WITHIN, tl.sum(tl.where(j == b, mass, 0), 0))
                tl.store(marks + MARK_HIGH, new_high)
                tl.store(marks + MARK_LOW, new_low)
                one = bracket.by_kappa & ((new_high >> ID_BITS) == (new_low >> ID_BITS))
                next_stage = tl.where(here <= sizes.ROOM, FEW_ENOUGH, NARROWED)
                next_stage = tl.where(one, ONE_KAPPA, next_stage)
                zero = j.to(tl.int64) * 0
                tl.store(in_mass + j, zero)
                tl.store(in_count + j, zero)
                nothing = tl.full([], 0, tl.int64)
                tl.store(marks + MARK_BRACKETED, nothing)
                tl.store(marks + MARK_UNDER_HIGH, nothing)
                tl.store(marks + MARK_OVER_LOW, nothing)
            tl.store(marks + MARK_NARROWED, tl.full([], 0, tl.int64))
            tl.store(marks + MARK_STAGE, next_stage.to(tl.int64))
