"""Passes over whole rows, mostly with many programs a row: maxima, masses, lists.

A row's list holds all its scaled logits from a floor up. The floor is a hint: what is decided never
depends on it, only how soon. No program reads more of a row than its share.
"""

import triton
import triton.language as tl

from fastadapt._ops.triton.arithmetic import (
    LOWEST_KEY,
    MIN_INT32,
    cutoff_of,
    exponentials,
    keys,
    log64,
    mass_target,
    masses,
    surprisals,
    values,
)
from fastadapt._ops.triton.bundles import Row, row_at
from fastadapt._ops.triton.nucleus import UNIT, reach_of
from fastadapt._ops.triton.rows import (
    ADAPTORS_SHIFT,
    ALL_WEIGHED,
    BASE,
    BINNED,
    EPSILON,
    ETA,
    KEEP,
    MARK_BRACKETED,
    MARK_CENTRE,
    MARK_FLOOR,
    MARK_LARGEST,
    MARK_LISTED,
    MARK_REACH,
    MARK_SPLIT,
    MARK_STAGE,
    MARK_TARGET,
    MARK_TIED,
    MAX_KEEP,
    MIN_P,
    SURPRISAL,
    TEMPERATURE,
    TO_COUNT,
    TOP_K,
    TOP_P,
    TYPICAL_P,
    UNLISTED,
    append,
    first_filter,
    follow,
    has,
    has_one_filter,
    hits_of,
    inverse_of,
    knobs_of,
    largest_of,
    lists_of,
    load_float,
    load_knob,
    load_scaled,
    marks_of,
    needs_masses,
    needs_surprisal,
    parts_of,
    push,
    store_float,
    sums_of,
    weights_of,
)
from fastadapt._ops.triton.ties import count_tile, is_level

FEW = tl.constexpr(8)  # groups of a tile that are read one by one


@triton.jit(do_not_specialize=["asked"])
def maxima_kernel(rows, asked, scratch, sizes, PDL: tl.constexpr):
    """Finds the largest logit of groups, super-groups and tiles; zeroes the row's counters.

    A tile is GROUP times COLUMNS logits, a group one of its columns: loads are contiguous, and
    neighbours are of different groups and super-groups, where sorted vocabularies have their best.
    """
    follow(PDL)
    at, tile = tl.program_id(0), tl.program_id(1)
    COLUMNS: tl.constexpr = sizes.COLUMNS
    TILE: tl.constexpr = COLUMNS * sizes.GROUP
    row = row_at(rows, at) + tile * TILE
    left = rows.v - tile * TILE
    c = tl.arange(0, COLUMNS)
    best = tl.full([COLUMNS], float("-inf"), tl.float32)
    if left >= TILE:
        for r in range(0, sizes.GROUP, sizes.AHEAD):
            for i in tl.static_range(sizes.AHEAD):
                x = tl.load(row + (r + i) * COLUMNS + c).to(tl.float32)
                best = tl.maximum(best, x, propagate_nan=tl.PropagateNan.ALL)
    else:
        for r in range(0, tl.cdiv(left, COLUMNS)):
            j = r * COLUMNS + c
            x = tl.load(row + j, mask=j < left, other=float("-inf")).to(tl.float32)
            best = tl.maximum(best, x, propagate_nan=tl.PropagateNan.ALL)
    parts = parts_of(scratch, asked, at, rows.v, sizes)
    tl.store(parts.groups + tile * COLUMNS + c, best)
    SUPERS: tl.constexpr = sizes.PER_TILE
    of_supers = tl.max(tl.reshape(best, (COLUMNS // SUPERS, SUPERS)), 0)
    tl.store(parts.supers + tile * SUPERS + tl.arange(0, SUPERS), of_supers)
    nan = tl.max((best != best).to(tl.int32), 0) > 0
    tl.store(parts.largest + tile, tl.where(nan, float("nan"), tl.max(best, 0)))
    number = asked >> ADAPTORS_SHIFT
    for adaptor in range(number):
        marks = marks_of(scratch, at * number + adaptor)
        for some in range(tile, tl.cdiv(scratch.words, COLUMNS), tl.num_programs(1)):
            j = some * COLUMNS + c
            tl.store(marks + j, j.to(tl.int64) * 0, mask=j < scratch.words)


@triton.jit(do_not_specialize=["packed", "asked"])
def weigh_kernel(
    rows, packed, asked, scratch, sizes,
    TOGETHER: tl.constexpr,  # blocks a program looks at at once
    PDL: tl.constexpr,
):  # fmt: skip
    """Sums integer masses by block, for rows whose first filter needs them, or for all."""
    follow(PDL)
    virtual, some = tl.program_id(0), tl.program_id(1)
    at, knobs = knobs_of(packed, asked, virtual)
    first = first_filter(knobs)
    with_surprisal = needs_surprisal(knobs)
    if needs_masses(first) | has(asked, ALL_WEIGHED):
        inverse = inverse_of(load_knob(knobs, TEMPERATURE))
        largest = largest_of(parts_of(scratch, asked, at, rows.v, sizes), sizes.SPLITS)
        m = largest * inverse + 0.0
        row = Row(row_at(rows, at), rows.v, inverse, m)
        base_row = Row(row.logits, rows.v, 1.0, largest)
        weights = weights_of(scratch, asked, at, virtual, rows.v, sizes)
        block = some * TOGETHER + tl.arange(0, TOGETHER)
        there = block < weights.blocks
        ids = block[:, None] * sizes.BLOCK + tl.arange(0, sizes.BLOCK)[None, :]
        s = load_scaled(row, ids)
        d = s - m
        tl.store(weights.sums + block, tl.sum(masses(d), 1), mask=there)
        if first == 0:
            number = tl.sum((s > float("-inf")).to(tl.int32), 1)
            tl.store(weights.finite + block, number, mask=there)
        if with_surprisal:
            tl.store(weights.surprisal_sums + block, tl.sum(surprisals(d), 1), mask=there)
        if has(asked, BASE) & (virtual == at * (asked >> ADAPTORS_SHIFT)):
            d1 = load_scaled(base_row, ids) - largest
            tl.store(weights.base_sums + block, tl.sum(masses(d1), 1), mask=there)
            if has(asked, SURPRISAL):
                u1 = tl.sum(surprisals(d1), 1)
                tl.store(weights.base_surprisal_sums + block, u1, mask=there)


@triton.jit(do_not_specialize=["packed", "asked"])
def sketch_kernel(rows, packed, asked, scratch, sizes, PDL: tl.constexpr):
    """Says what a nucleus is; for top-p bounds how far down it reaches, by the best of groups.

    That helps where few tokens have most of the mass: they become the row's list. Other rows have
    none before their bins.
    """
    follow(PDL)
    virtual = tl.program_id(0)
    at, knobs = knobs_of(packed, asked, virtual)
    first = first_filter(knobs)
    by_kappa = first == TYPICAL_P
    if (load_knob(knobs, TEMPERATURE) > 0) & (by_kappa | (first == TOP_P)):
        inverse = inverse_of(load_knob(knobs, TEMPERATURE))
        parts = parts_of(scratch, asked, at, rows.v, sizes)
        m = largest_of(parts, sizes.SPLITS) * inverse + 0.0
        weights = weights_of(scratch, asked, at, virtual, rows.v, sizes)
        z, u = sums_of(weights, sizes.BLOCKS)
        z = tl.maximum(z, 1)
        centre = (u.to(tl.float64) / z.to(tl.float64)).to(tl.float32)
        centre = tl.where(by_kappa, centre, 0.0)
        value = load_knob(knobs, first)
        target = mass_target(value * z.to(tl.float64))
        reach = reach_of(value, z, rows.v, centre, by_kappa)
        marks = marks_of(scratch, virtual)
        # all tokens have the mass of the largest: all are of the first bin
        flat = (z == (target * 0 + rows.v) << 40) & (rows.v > sizes.ROOM) & has_one_filter(knobs)
        if flat:
            unlisted = target * 0 + UNLISTED
            tl.store(marks + MARK_STAGE, target * 0 + BINNED)
            tl.store(marks + MARK_SPLIT, target * 0 + TO_COUNT)
            tl.store(marks + MARK_LISTED, unlisted)
            tl.store(marks + MARK_BRACKETED, unlisted)
            store_float(marks + MARK_FLOOR, reach * 0.0 + float("inf"))
        elif first == TOP_P:
            number = parts.splits * sizes.COLUMNS
            j = tl.arange(0, sizes.SPLITS * sizes.COLUMNS)
            d = tl.load(parts.groups + j, mask=j < number, other=float("-inf")) * inverse - m
            mass = exponentials(d)
            wanted = target.to(tl.float32) * 1.0001
            low, high = -reach, reach * 0.0
            for _ in range(12):
                middle = (low + high) * 0.5
                enough = tl.sum(tl.where(d >= middle, mass, 0.0), 0) >= wanted
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
            floor = tl.where(rows.v <= sizes.ROOM, float("-inf"), float("inf"))
            if tl.sum(tl.where(d >= low, mass, 0.0), 0) >= wanted:
                slack = 1e-4 + tl.abs(m) * 3e-7
                reach = tl.minimum(reach, slack - low)
                # of a group, mostly one or two tokens are as good as the largest of the last one
                few = tl.sum((d >= low).to(tl.int32), 0) <= sizes.ROOM * 3 // 8
                floor = tl.where(few, tl.minimum(floor, m + low - slack), floor)
            store_float(marks + MARK_FLOOR, floor)
            if floor == float("inf"):
                tl.store(marks + MARK_LISTED, tl.full([], 0, tl.int64) + UNLISTED)
        store_float(marks + MARK_REACH, reach)
        store_float(marks + MARK_CENTRE, centre)
        store_float(marks + MARK_LARGEST, m)
        tl.store(marks + MARK_TARGET, target)


@triton.jit
def _kth_largest(supers, number, k, SUPERS: tl.constexpr):
    """Returns a logit that at least k tokens reach, and not many more, from super-groups.

    With it, whether it is the largest logit of most of them, as where many tokens are tied.
    """
    j = tl.arange(0, SUPERS)
    key = keys(tl.load(supers + j, mask=j < number, other=float("-inf")))
    low, high = tl.min(tl.where(j < number, key, 2**31 - 1), 0), tl.max(key, 0)
    low = tl.where(k > number, MIN_INT32, low)
    high = tl.where(k > number, MIN_INT32, high)
    reached = number
    while low < high:
        middle = high - ((high.to(tl.int64) - low) // 2).to(tl.int32)
        reach = tl.sum((key >= middle).to(tl.int32), 0)
        low = tl.where(reach >= k, middle, low)
        reached = tl.where(reach >= k, reach, reached)
        # a little more than k do as well
        enough = (reach >= k) & (reach <= k + k // 8)
        high = tl.where(reach < k, middle - 1, tl.where(enough, middle, high))
    tied = k < 0
    if reached > number // 2:
        low = tl.min(tl.where(key >= low, key, 2**31 - 1), 0)
        tied = (2 * tl.sum((key == low).to(tl.int32), 0) > number) & (low > LOWEST_KEY)
    return tl.where(k > number, float("-inf"), values(low)), tied


@triton.jit
def _top_k_floor(parts, v, knobs, inverse, sizes):
    """Returns a scaled logit that as many tokens reach as top-k keeps; whether to count ties."""
    keep = load_knob(knobs, KEEP)
    k = tl.maximum(load_knob(knobs, TOP_K), keep)
    k = tl.minimum(k, MAX_KEEP).to(tl.int32)
    number = parts.splits * sizes.PER_TILE
    SUPERS: tl.constexpr = sizes.SPLITS * sizes.PER_TILE
    largest, tied = _kth_largest(parts.supers, number, k, SUPERS)
    few = v <= sizes.LIST
    # a minimum of tokens takes a cut of its own, for which those of a level are told apart
    return tl.where(few, float("-inf"), largest * inverse), tied & (keep <= 1) & (few == 0)


@triton.jit
def _mass_floor(weights, v, knobs, first, m, sizes):
    """Returns the scaled logit from which min-p, epsilon or eta keeps tokens, or one below."""
    value = load_knob(knobs, first)
    share = tl.minimum(value, 1.0)
    if first != MIN_P:
        z, u = sums_of(weights, sizes.BLOCKS)
        p = cutoff_of(first == ETA, value, tl.maximum(z, 1), u)
        # the most probable stay, however high the cutoff
        share = tl.minimum(p * z.to(tl.float64) / UNIT, 1.0)
    floor = m + log64(tl.maximum(share, 1e-30)).to(tl.float32) - (1e-3 + tl.abs(m) * 3e-7)
    return tl.where(v <= sizes.LIST, float("-inf"), floor)


@triton.jit
def _list_columns(scratch, virtual, row, tile, hit, floor, sizes, AT_ONCE: tl.constexpr):
    """Lists the tokens of some groups of a tile from the floor up, so many groups at a time."""
    listed = lists_of(scratch, virtual, sizes)[0]
    count = marks_of(scratch, virtual) + MARK_LISTED
    c = tl.arange(0, sizes.COLUMNS)
    turn = tl.cumsum(hit.to(tl.int32), 0) - 1
    left = tl.sum(hit.to(tl.int32), 0)
    for done in range(0, left, AT_ONCE):
        wanted = done + tl.arange(0, AT_ONCE)
        here = hit[None, :] & (turn[None, :] == wanted[:, None])
        column = tl.sum(tl.where(here, c[None, :], 0), 1)
        r = tl.arange(0, sizes.GROUP)[:, None]
        ids = tile * (sizes.COLUMNS * sizes.GROUP) + column[None, :] + r * sizes.COLUMNS
        there = tl.reshape((wanted < left)[None, :] & (r >= 0), (sizes.GROUP * AT_ONCE,))
        ids = tl.reshape(ids, (sizes.GROUP * AT_ONCE,))
        s = tl.where(there, load_scaled(row, ids), float("-inf"))
        good = (s >= floor) & (s > float("-inf"))
        push(listed, count, s, ids, good, sizes.ROOM)


@triton.jit
def _list_tile(row, tile, floor, sizes):
    """Returns bits and numbers of the tokens of a tile from the floor up."""
    COLUMNS: tl.constexpr = sizes.COLUMNS
    tl.static_assert(sizes.GROUP <= 32)
    ids = tile * (COLUMNS * sizes.GROUP) + tl.arange(0, COLUMNS)
    bits, number = tl.zeros([COLUMNS], tl.int32), tl.zeros([COLUMNS], tl.int32)
    for r in range(0, sizes.GROUP, sizes.AHEAD):
        for i in tl.static_range(sizes.AHEAD):
            s = load_scaled(row, ids + (r + i) * COLUMNS)
            good = ((s >= floor) & (s > float("-inf"))).to(tl.int32)
            bits |= good << (r + i)
            number += good
    return bits, number


@triton.jit(do_not_specialize=["packed", "asked"])
def list_kernel(rows, packed, asked, scratch, sizes, PDL: tl.constexpr):
    """Lists the tokens from a floor up, from the groups that reach it.

    It is set by rank for rows that begin with top-k or are greedy, by mass for those that begin
    with another filter but typical.
    """
    follow(PDL)
    virtual, part = tl.program_id(0), tl.program_id(1)
    at, knobs = knobs_of(packed, asked, virtual)
    temperature, first = load_knob(knobs, TEMPERATURE), first_filter(knobs)
    greedy = temperature == 0
    by_rank = greedy | (first == TOP_K)
    by_mass = (first == TOP_P) | (first == MIN_P) | (first == EPSILON) | (first == ETA)
    by_mass &= temperature > 0
    if by_rank | by_mass:
        inverse = inverse_of(temperature)
        parts = parts_of(scratch, asked, at, rows.v, sizes)
        m = largest_of(parts, sizes.SPLITS) * inverse + 0.0
        weights = weights_of(scratch, asked, at, virtual, rows.v, sizes)
        marks = marks_of(scratch, virtual)
        floor, tied = m, first < 0
        if by_mass:
            if first == TOP_P:
                floor = load_float(marks + MARK_FLOOR)
            else:
                floor = _mass_floor(weights, rows.v, knobs, first, m, sizes)
        elif greedy == 0:
            floor, tied = _top_k_floor(parts, rows.v, knobs, inverse, sizes)
        else:
            tied = is_level(parts, m, inverse, sizes)
        row = Row(row_at(rows, at), rows.v, inverse, m)
        for tile in range(part, parts.splits, tl.num_programs(1)):
            hit = hits_of(parts, tile, inverse, floor, sizes.COLUMNS)
            left = tl.sum(hit.to(tl.int32), 0)
            if tied | (left > FEW):
                if tied:
                    bits, number = count_tile(marks + MARK_TIED, weights, row, tile, floor, sizes)
                else:
                    bits, number = _list_tile(row, tile, floor, sizes)
                ids = tile * (sizes.COLUMNS * sizes.GROUP) + tl.arange(0, sizes.COLUMNS)
                listed = lists_of(scratch, virtual, sizes)[0]
                count = marks + MARK_LISTED
                append(listed, count, row, ids, bits, number, sizes.COLUMNS, sizes.ROOM)
            elif left > 0:
                _list_columns(scratch, virtual, row, tile, hit, floor, sizes, FEW // 2)
        if (part == 0) & (by_rank | (first != TOP_P)):
            store_float(marks + MARK_FLOOR, floor)
