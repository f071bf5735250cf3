"""Finds where the nucleus of a whole row ends, for top-p and typical, with many programs a row.

Masses are summed by bins of d, the distance to the maximum, or of kappa; the bin in which the
nucleus ends is its bracket: few tokens, mostly. Where they are many, as on flat rows, rounds of
finer bins narrow it, by their keys and then by their ids.
"""

import triton
import triton.language as tl

from fastadapt._ops.triton.arithmetic import exponentials, keys, log64, masses
from fastadapt._ops.triton.bundles import Bracket, Row, row_at
from fastadapt._ops.triton.rows import (
    BINNED,
    BRACKET_LISTED,
    FEW_ENOUGH,
    MARK_ABOVE,
    MARK_BINNED,
    MARK_BRACKETED,
    MARK_END,
    MARK_HIGH,
    MARK_LISTED,
    MARK_LOW,
    MARK_NARROWED,
    MARK_OVER_LOW,
    MARK_REACH,
    MARK_SETTLED,
    MARK_STAGE,
    MARK_UNDER_HIGH,
    MARK_WITHIN,
    MARKS,
    NARROWED,
    ONE_KAPPA,
    TEMPERATURE,
    TOP_P,
    TYPICAL_P,
    first_filter,
    inverse_of,
    knobs_of,
    largest_of,
    load_knob,
    load_scaled,
    marks_of,
    mass_target,
    sums_of,
    typicality,
)

UNIT = tl.constexpr(1.099511627776e12)  # 2^40
ID_BITS = tl.constexpr(22)  # the longest row has 2^22 ids
LAST_PLACE = tl.constexpr((1 << 22) - 1)


@triton.jit
def _reach(value, z, v, centre, by_kappa):
    """Returns how far below 0, in d or -kappa, tokens can matter to a nucleus of a given mass.

    All tokens below that d together have less than half of the mass that is left out.
    """
    left_out = (1.0 - value) * z.to(tl.float64) / (2.0 * UNIT)
    left_out = left_out / tl.cast(v, tl.float64)  # an argument that is 1 has no `to`
    d = log64(tl.maximum(left_out, 1e-13)).to(tl.float32)  # at least -30: masses end at -28
    return tl.where(by_kappa, tl.maximum(centre, -d - centre), -d)


@triton.jit
def _nucleus_of(
    parts, lists, weights, virtual, at, v, knobs, SPLITS: tl.constexpr, BLOCKS: tl.constexpr
):
    """Returns what top-p or typical needs: 1 / T, m, the target, and the bracket so far."""
    inverse = inverse_of(load_knob(knobs, TEMPERATURE))
    m = largest_of(parts, at, SPLITS) * inverse + 0.0
    z, u = sums_of(weights, virtual, BLOCKS)
    z = tl.maximum(z, 1)
    first = first_filter(knobs)
    by_kappa = first == TYPICAL_P
    centre = (u.to(tl.float64) / z.to(tl.float64)).to(tl.float32)
    centre = tl.where(by_kappa, centre, 0.0)
    value = load_knob(knobs, first)
    reach = _reach(value, z, v, centre, by_kappa)
    marks = marks_of(lists, virtual)
    bound = tl.load(marks + MARK_REACH).to(tl.int32)
    bound = bound.to(tl.float32, bitcast=True)
    reach = tl.where(bound > 0, tl.minimum(reach, bound), reach)
    stage, end = tl.load(marks + MARK_STAGE).to(tl.int32), tl.load(marks + MARK_END).to(tl.int32)
    bracket = Bracket(stage, by_kappa, centre, reach, end)
    return inverse, m, mass_target(value * z.to(tl.float64)), bracket


@triton.jit
def bracket_of(
    parts, lists, weights, virtual, at, v, knobs,
    SPLITS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Returns the bracket of a row that begins with top-p or typical, from its bins."""
    _, _, _, bracket = _nucleus_of(parts, lists, weights, virtual, at, v, knobs, SPLITS, BLOCKS)
    return bracket


@triton.jit
def no_bracket():
    """Returns the bracket of a row that needs none."""
    none = tl.full([], 0, tl.int32)
    return Bracket(none, none < 0, none.to(tl.float32), none.to(tl.float32), none)


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
def push(s_out, ids_out, count, s, ids, good, ROOM: tl.constexpr):
    """Appends tokens to a list as far as there is room, and counts all of them."""
    many = tl.sum(good.to(tl.int32), 0)
    if many > 0:
        place = tl.cumsum(good.to(tl.int32), 0) - 1
        place += tl.atomic_add(count, many.to(tl.int64), sem="relaxed")
        good &= place < ROOM
        tl.store(s_out + place, s, mask=good)
        tl.store(ids_out + place, ids, mask=good)


@triton.jit
def _add_by_bin(sums, b, value, hit, BINS: tl.constexpr):
    """Adds weights to bins; tokens of one bin are summed first, which helps tied rows."""
    left = tl.sum(hit.to(tl.int32), 0)
    while left > 0:
        most = tl.max(tl.where(hit, b, -1), 0)
        same = hit & (b == most)
        many = tl.sum(same.to(tl.int32), 0)
        if many * 8 >= left:
            tl.atomic_add(sums + most, tl.sum(tl.where(same, value, 0), 0), sem="relaxed")
            hit = hit & (b != most)
            left -= many
        else:
            tl.atomic_add(sums + b, value, mask=hit, sem="relaxed")
            left = left * 0


@triton.jit
def sketch_kernel(
    rows, adaptors, parts, lists, weights,
    MOST: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Bounds how far down a nucleus of top-p reaches, from the largest logits of groups.

    That helps where few tokens have most of the mass. Where the nucleus takes no more than MOST
    groups, a list holds their tokens, and that is the row's floor; other rows go to their bins.
    """
    virtual = tl.program_id(0)
    at, knobs = knobs_of(adaptors, virtual)
    if (load_knob(knobs, TEMPERATURE) > 0) & (first_filter(knobs) == TOP_P):
        inverse, m, target, bracket = _nucleus_of(
            parts, lists, weights, virtual, at, rows.v, knobs, SPLITS, BLOCKS
        )
        number = parts.splits * COLUMNS
        j = tl.arange(0, GROUPS)
        groups = parts.groups + at.to(tl.int64) * number
        d = tl.load(groups + j, mask=j < number, other=float("-inf")) * inverse - m
        mass = exponentials(d)
        wanted = target.to(tl.float32) * 1.0001
        low, high = -bracket.reach, bracket.reach * 0.0
        for _ in range(16):
            middle = (low + high) * 0.5
            enough = tl.sum(tl.where(d >= middle, mass, 0.0), 0) >= wanted
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        if tl.sum(tl.where(d >= low, mass, 0.0), 0) >= wanted:
            marks = marks_of(lists, virtual)
            slack = 1e-4 + tl.abs(m) * 3e-7
            if tl.sum((d >= low).to(tl.int32), 0) <= MOST:
                tl.store(lists.floors + virtual, m + low - slack)
                tl.store(marks + MARK_SETTLED, tl.full([], 1, tl.int64))
            tl.store(marks + MARK_REACH, (slack - low).to(tl.int32, bitcast=True).to(tl.int64))


@triton.jit
def bins_kernel(
    rows, adaptors, parts, lists, weights,
    STEP: tl.constexpr, STEPS: tl.constexpr, BINS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Sums masses by bins, in one read, for rows whose nucleus is not settled.

    Whoever is last of a row finds its bracket, and the floor under it.
    """
    virtual, part = tl.program_id(0), tl.program_id(1)
    at, knobs = knobs_of(adaptors, virtual)
    first = first_filter(knobs)
    marks = marks_of(lists, virtual)
    asked = (load_knob(knobs, TEMPERATURE) > 0) & ((first == TYPICAL_P) | (first == TOP_P))
    if asked & (tl.load(marks + MARK_SETTLED) == 0):
        inverse, m, target, bracket = _nucleus_of(
            parts, lists, weights, virtual, at, rows.v, knobs, SPLITS, BLOCKS
        )
        row = Row(row_at(rows, at), rows.v, inverse, m)
        for i in range(STEPS):
            ids = (part * STEPS + i) * STEP + tl.arange(0, STEP)
            d = load_scaled(row, ids) - m
            mass = masses(d)
            b, hit = _bin_of(d, bracket, BINS)
            _add_by_bin(marks + MARKS, b, mass, hit & (mass > 0), BINS)
        tl.debug_barrier()
        if tl.atomic_add(marks + MARK_BINNED, 1, sem="acq_rel") == tl.num_programs(1) - 1:
            j = tl.arange(0, BINS)
            mass = tl.load(marks + MARKS + j)
            running = tl.cumsum(mass, 0)
            end = tl.sum((running < target).to(tl.int32), 0)
            width = bracket.reach / BINS
            edge = (end + 1).to(tl.float32) * width * 1.00001 + tl.abs(m) * 3e-7
            floor = tl.where(end < BINS, m - edge - bracket.centre, float("-inf"))
            tl.store(lists.floors + virtual, floor)
            if end < BINS:
                tl.store(marks + MARK_END, end.to(tl.int64))
                tl.store(marks + MARK_ABOVE, tl.sum(tl.where(j < end, mass, 0), 0))
                tl.store(marks + MARK_STAGE, tl.full([], 0, tl.int64) + BINNED)


@triton.jit
def _places(q, ids, by_kappa):
    """Returns key and id in the order of ranks; equally typical tokens share one place."""
    own = tl.where(by_kappa, 0, LAST_PLACE - ids)
    return (keys(q).to(tl.int64) << ID_BITS) + own


@triton.jit
def narrow_kernel(
    rows, adaptors, parts, lists, weights,
    STEP: tl.constexpr, BINS: tl.constexpr, ROOM: tl.constexpr,
    SPLITS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Narrows a bracket too large for a list: finer bins, or in the end the list."""
    virtual, part = tl.program_id(0), tl.program_id(1)
    marks = marks_of(lists, virtual)
    stage = tl.load(marks + MARK_STAGE).to(tl.int32)
    bracketed = tl.load(marks + MARK_BRACKETED)
    active = (stage == NARROWED) | (stage == FEW_ENOUGH)
    active |= (stage == BINNED) & (bracketed > ROOM) & (tl.load(marks + MARK_LISTED) > ROOM)
    if active:
        at, knobs = knobs_of(adaptors, virtual)
        inverse, m, target, bracket = _nucleus_of(
            parts, lists, weights, virtual, at, rows.v, knobs, SPLITS, BLOCKS
        )
        row = Row(row_at(rows, at), rows.v, inverse, m)
        low, high = tl.load(marks + MARK_LOW), tl.load(marks + MARK_HIGH)
        if stage == BINNED:  # about where the bin is; which tokens are in it, `around` says
            width = bracket.reach / BINS
            origin = tl.where(bracket.by_kappa, 0.0, m)
            slack = tl.where(bracket.by_kappa, 1e-6, tl.abs(m) * 3e-7)
            top = origin - bracket.end.to(tl.float32) * width * 0.99999 + slack
            bottom = origin - (bracket.end + 1).to(tl.float32) * width * 1.00001 - slack
            high = (keys(tl.minimum(top, origin)).to(tl.int64) << ID_BITS) + LAST_PLACE
            low = keys(bottom).to(tl.int64) << ID_BITS
        shift = tl.full([], 0, tl.int64)
        while ((high - low) >> shift) >= BINS:
            shift += 1
        in_mass, in_count = marks + MARKS + BINS, marks + MARKS + 2 * BINS
        list_at = virtual.to(tl.int64) * ROOM
        for step in range(part, tl.cdiv(rows.v, STEP), tl.num_programs(1)):
            ids = step * STEP + tl.arange(0, STEP)
            s = load_scaled(row, ids)
            d = s - m
            mass = masses(d)
            q = tl.where(bracket.by_kappa, typicality(d, bracket.centre), s)
            place = _places(q, ids, bracket.by_kappa)
            hit = (place >= low) & (place <= high) & (mass > 0)
            if stage == BINNED:
                _, within = around(d, bracket, BINS)
                hit &= within
            if stage == FEW_ENOUGH:
                spare = lists.spare + list_at
                push(spare, lists.spare_ids + list_at, marks + MARK_BRACKETED, s, ids, hit, ROOM)
            else:
                b = tl.minimum(tl.maximum((high - place) >> shift, 0), BINS - 1).to(tl.int32)
                b = tl.where(hit, b, 0)
                _add_by_bin(in_mass, b, mass, hit, BINS)
                _add_by_bin(in_count, b, hit.to(tl.int64), hit, BINS)
                under = tl.max(tl.where(hit, high - place, 0), 0)
                over = tl.max(tl.where(hit, place - low, 0), 0)
                if tl.max(hit.to(tl.int32), 0) > 0:
                    tl.atomic_max(marks + MARK_UNDER_HIGH, under, sem="relaxed")
                    tl.atomic_max(marks + MARK_OVER_LOW, over, sem="relaxed")
        tl.debug_barrier()
        if tl.atomic_add(marks + MARK_NARROWED, 1, sem="acq_rel") == tl.num_programs(1) - 1:
            next_stage = tl.full([], 0, tl.int32) + BRACKET_LISTED
            if stage != FEW_ENOUGH:
                j = tl.arange(0, BINS)
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
                next_stage = tl.where(here <= ROOM, FEW_ENOUGH, NARROWED)
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
