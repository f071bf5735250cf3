"""What becomes of the bracket of a whole row: a list or, of too many tokens, a count by block.

Equal tokens, as flat and tied rows have, are a level: one entry of a list, which needs no finer
bins and no other pass over the row.
"""

import triton
import triton.language as tl

from fastadapt._ops.triton.arithmetic import MIN_INT32, keys, masses, values
from fastadapt._ops.triton.bundles import Row, row_at
from fastadapt._ops.triton.nucleus import around, nucleus_of
from fastadapt._ops.triton.rows import (
    MARK_BRACKETED,
    MARK_FLOOR,
    MARK_LISTED,
    MARK_NARROWED,
    MARK_OVER_LOW,
    MARK_SPLIT,
    MARK_STAGE,
    MARK_TIED,
    MARK_UNDER_HIGH,
    ONE_LEVEL,
    TO_COUNT,
    TO_LIST,
    UNLISTED,
    append,
    follow,
    has_one_filter,
    hits_of,
    knobs_of,
    lists_of,
    load_float,
    load_scaled,
    marks_of,
    parts_of,
    store_float,
    weights_of,
)

MAX_INT32 = tl.constexpr(2**31 - 1)


@triton.jit
def _count_tile(weights, row, tile, bracket, most, least, sizes):
    """Counts the tokens of a bracket in a tile by block, and sums what is above it.

    Returns their number, and the largest and the least key of columns with what is given.
    """
    COLUMNS: tl.constexpr = sizes.COLUMNS
    BY_BLOCK: tl.constexpr = sizes.BLOCK // sizes.COLUMNS  # logits of a group
    ids = tile * (COLUMNS * sizes.GROUP) + tl.arange(0, COLUMNS)
    many = tl.full([], 0, tl.int32)
    for r in range(0, sizes.GROUP, BY_BLOCK):
        mass, better = tl.zeros([COLUMNS], tl.int64), tl.zeros([COLUMNS], tl.int32)
        number = tl.zeros([COLUMNS], tl.int32)
        for i in tl.static_range(BY_BLOCK):
            s = load_scaled(row, ids + (r + i) * COLUMNS)
            above, within = around(s - row.m, bracket, sizes.BINS)
            number += within.to(tl.int32)
            key = keys(s)
            most = tl.maximum(most, tl.where(within, key, MIN_INT32))
            least = tl.minimum(least, tl.where(within, key, MAX_INT32))
            if bracket.end > 0:
                mass += tl.where(above, masses(s - row.m), 0)
                better += above.to(tl.int32)
        block = tile * (sizes.GROUP // BY_BLOCK) + r // BY_BLOCK
        here = tl.sum(number, 0)
        many += here
        if block < weights.blocks:
            tl.store(weights.tied + block, here)
            tl.store(weights.kept_sums + block, tl.sum(mass, 0))
            tl.store(weights.finite + block, tl.sum(better, 0))
    return many, most, least


@triton.jit
def _count_bracket(rows, at, knobs, asked, scratch, virtual, part, sizes):
    """Counts the tokens of a bracket by block, and makes it a level if all are equal."""
    marks = marks_of(scratch, virtual)
    inverse, m, _, bracket = nucleus_of(scratch, virtual, knobs)
    row = Row(row_at(rows, at), rows.v, inverse, m)
    weights = weights_of(scratch, asked, at, virtual, rows.v, sizes)
    most = tl.full([sizes.COLUMNS], MIN_INT32, tl.int32)
    least = tl.full([sizes.COLUMNS], MAX_INT32, tl.int32)
    many = tl.full([], 0, tl.int32)
    tiles = tl.cdiv(rows.v, sizes.COLUMNS * sizes.GROUP)
    for tile in range(part, tiles, tl.num_programs(1)):
        more, most, least = _count_tile(weights, row, tile, bracket, most, least, sizes)
        many += more
    if many > 0:  # what is largest is so of numbers that begin at 0
        tl.atomic_add(marks + MARK_TIED, many.to(tl.int64), sem="relaxed")
        over = tl.max(most, 0).to(tl.int64) - MIN_INT32
        under = MAX_INT32 - tl.min(least, 0).to(tl.int64)
        tl.atomic_max(marks + MARK_OVER_LOW, over, sem="relaxed")
        tl.atomic_max(marks + MARK_UNDER_HIGH, under, sem="relaxed")
    tl.debug_barrier()
    if tl.atomic_add(marks + MARK_NARROWED, 1, sem="acq_rel") == tl.num_programs(1) - 1:
        # of atomic operations a first-level cache may not know
        high = tl.load(marks + MARK_OVER_LOW, cache_modifier=".cg") + MIN_INT32
        low = MAX_INT32 - tl.load(marks + MARK_UNDER_HIGH, cache_modifier=".cg")
        nothing = high * 0
        if high == low:
            store_float(marks + MARK_FLOOR, values(high.to(tl.int32)))
            tl.store(marks + MARK_BRACKETED, nothing + 1)
            tl.store(marks + MARK_STAGE, nothing + ONE_LEVEL)
        else:
            tl.store(marks + MARK_TIED, nothing)
        tl.store(marks + MARK_OVER_LOW, nothing)
        tl.store(marks + MARK_UNDER_HIGH, nothing)
        tl.store(marks + MARK_NARROWED, nothing)


@triton.jit(do_not_specialize=["packed", "asked"])
def split_kernel(rows, packed, asked, scratch, sizes, PDL: tl.constexpr):
    """Lists the bracket of a row with bins that has no list, or counts it if it has no room.

    With it, the tokens from the floor up or, where one filter is all, the masses of what is above
    the bracket by blocks. Whoever is last to count says whether the bracket is a level.
    """
    follow(PDL)
    virtual, part = tl.program_id(0), tl.program_id(1)
    marks = marks_of(scratch, virtual)
    way = tl.load(marks + MARK_SPLIT)
    if way == TO_COUNT:
        at, knobs = knobs_of(packed, asked, virtual)
        _count_bracket(rows, at, knobs, asked, scratch, virtual, part, sizes)
    elif way == TO_LIST:
        at, knobs = knobs_of(packed, asked, virtual)
        inverse, m, target, bracket = nucleus_of(scratch, virtual, knobs)
        row = Row(row_at(rows, at), rows.v, inverse, m)
        parts = parts_of(scratch, asked, at, rows.v, sizes)
        weights = weights_of(scratch, asked, at, virtual, rows.v, sizes)
        floor = load_float(marks + MARK_FLOOR)
        alone = has_one_filter(knobs)
        listed, spare = lists_of(scratch, virtual, sizes)
        COLUMNS: tl.constexpr = sizes.COLUMNS
        BY_BLOCK: tl.constexpr = sizes.BLOCK // sizes.COLUMNS  # logits of a group
        for tile in range(part, parts.splits, tl.num_programs(1)):
            ids = tile * (COLUMNS * sizes.GROUP) + tl.arange(0, COLUMNS)
            bits, number = tl.zeros([COLUMNS], tl.int32), tl.zeros([COLUMNS], tl.int32)
            all_bits, all_number = bits, number
            hit = hits_of(parts, tile, inverse, floor, sizes.COLUMNS)
            reached = tl.max(hit.to(tl.int32), 0) > 0
            for r in range(0, sizes.GROUP, BY_BLOCK):
                mass, better = tl.zeros([COLUMNS], tl.int64), tl.zeros([COLUMNS], tl.int32)
                if reached:
                    for i in tl.static_range(BY_BLOCK):
                        s = load_scaled(row, ids + (r + i) * COLUMNS)
                        above, within = around(s - m, bracket, sizes.BINS)
                        bits |= within.to(tl.int32) << (r + i)
                        number += within.to(tl.int32)
                        if alone:
                            mass += tl.where(above, masses(s - m), 0)
                            better += above.to(tl.int32)
                        else:
                            good = ((s >= floor) & (s > float("-inf"))).to(tl.int32)
                            all_bits |= good << (r + i)
                            all_number += good
                block = tile * (sizes.GROUP // BY_BLOCK) + r // BY_BLOCK
                if alone & (block < weights.blocks):
                    tl.store(weights.kept_sums + block, tl.sum(mass, 0))
                    tl.store(weights.finite + block, tl.sum(better, 0))
            count = marks + MARK_BRACKETED
            append(spare, count, row, ids, bits, number, COLUMNS, sizes.ROOM)
            count = marks + MARK_LISTED
            append(listed, count, row, ids, all_bits, all_number, COLUMNS, sizes.ROOM)
        if (part == 0) & alone:
            tl.atomic_add(marks + MARK_LISTED, tl.full([], 0, tl.int64) + UNLISTED, sem="relaxed")
