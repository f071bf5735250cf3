"""Passes over whole rows, with many programs a row: maxima, masses, bins, the list.

A row's list holds all its scaled logits from a floor up. The floor is a hint: what is decided never
depends on it, only how soon. No program reads more of a row than its share.
"""

import triton
import triton.language as tl

from fastadapt._ops.triton.arithmetic import MIN_INT32, keys, log64, masses, surprisals, values
from fastadapt._ops.triton.bundles import Row, row_at
from fastadapt._ops.triton.nucleus import UNIT, around, bracket_of, no_bracket, push
from fastadapt._ops.triton.rows import (
    BINNED,
    ETA,
    KEEP,
    MARK_BRACKETED,
    MARK_LISTED,
    MAX_KEEP,
    MIN_P,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    TYPICAL_P,
    UNLISTED,
    cutoff_of,
    first_filter,
    has_one_filter,
    inverse_of,
    knobs_of,
    largest_of,
    load_knob,
    load_scaled,
    marks_of,
    needs_masses,
    needs_surprisal,
    sums_of,
)

FEW = tl.constexpr(8)  # groups of a tile that are read one by one
AT_ONCE = tl.constexpr(4)


@triton.jit
def maxima_kernel(
    rows, adaptors, parts, lists,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr, AHEAD: tl.constexpr, SUPERS: tl.constexpr,
):  # fmt: skip
    """Finds the largest logit of groups, super-groups and tiles; zeroes the row's counters.

    A tile is GROUP times COLUMNS logits, a group one of its columns: loads are contiguous, and
    neighbours are of different groups and super-groups, where sorted vocabularies have their best.
    """
    at, tile = tl.program_id(0), tl.program_id(1)
    row = row_at(rows, at) + tile * (COLUMNS * GROUP)
    left = rows.v - tile * (COLUMNS * GROUP)
    c = tl.arange(0, COLUMNS)
    best = tl.full([COLUMNS], float("-inf"), tl.float32)
    if left >= COLUMNS * GROUP:
        for r in range(0, GROUP, AHEAD):
            for i in tl.static_range(AHEAD):
                x = tl.load(row + (r + i) * COLUMNS + c).to(tl.float32)
                best = tl.maximum(best, x, propagate_nan=tl.PropagateNan.ALL)
    else:
        for r in range(0, tl.cdiv(left, COLUMNS)):
            j = r * COLUMNS + c
            x = tl.load(row + j, mask=j < left, other=float("-inf")).to(tl.float32)
            best = tl.maximum(best, x, propagate_nan=tl.PropagateNan.ALL)
    part = at.to(tl.int64) * parts.splits + tile
    tl.store(parts.groups + part * COLUMNS + c, best)
    of_supers = tl.max(tl.reshape(best, (COLUMNS // SUPERS, SUPERS)), 0)
    tl.store(parts.supers + part * SUPERS + tl.arange(0, SUPERS), of_supers)
    nan = tl.max((best != best).to(tl.int32), 0) > 0
    tl.store(parts.largest + part, tl.where(nan, float("nan"), tl.max(best, 0)))
    words = lists.step * adaptors.number
    marks = lists.marks + at.to(tl.int64) * words
    for some in range(tile, tl.cdiv(words, COLUMNS), tl.num_programs(1)):
        j = some * COLUMNS + c
        tl.store(marks + j, j.to(tl.int64) * 0, mask=j < words)


@triton.jit
def weigh_kernel(
    rows, adaptors, parts, weights,
    ALWAYS: tl.constexpr, BASE: tl.constexpr, BASE_SURPRISAL: tl.constexpr, BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,  # blocks a program looks at at once
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Sums integer masses by block, for rows whose first filter needs them, or for all."""
    virtual, some = tl.program_id(0), tl.program_id(1)
    at, knobs = knobs_of(adaptors, virtual)
    first = first_filter(knobs)
    needed = needs_masses(first) | ALWAYS
    with_surprisal = needs_surprisal(knobs)
    with_base = virtual % adaptors.number == 0
    if needed:
        inverse = inverse_of(load_knob(knobs, TEMPERATURE))
        largest = largest_of(parts, at, SPLITS)
        m = largest * inverse + 0.0
        row = Row(row_at(rows, at), rows.v, inverse, m)
        base_row = Row(row.logits, rows.v, 1.0, largest)
        out = virtual.to(tl.int64) * weights.blocks
        base_out = at.to(tl.int64) * weights.blocks
        block = some * TOGETHER + tl.arange(0, TOGETHER)
        there = block < weights.blocks
        ids = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        s = load_scaled(row, ids)
        d = s - m
        tl.store(weights.sums + out + block, tl.sum(masses(d), 1), mask=there)
        if first == 0:
            number = tl.sum((s > float("-inf")).to(tl.int32), 1)
            tl.store(weights.finite + out + block, number, mask=there)
        if with_surprisal:
            u = tl.sum(surprisals(d), 1)
            tl.store(weights.surprisal_sums + out + block, u, mask=there)
        if BASE:
            if with_base:
                d1 = load_scaled(base_row, ids) - largest
                z1 = tl.sum(masses(d1), 1)
                tl.store(weights.base_sums + base_out + block, z1, mask=there)
                if BASE_SURPRISAL:
                    u1 = tl.sum(surprisals(d1), 1)
                    tl.store(weights.base_surprisal_sums + base_out + block, u1, mask=there)


@triton.jit
def _kth_largest(supers, number, k, SUPERS: tl.constexpr):
    """Returns a logit that at least k tokens reach, and not many more, from super-groups."""
    j = tl.arange(0, SUPERS)
    key = keys(tl.load(supers + j, mask=j < number, other=float("-inf")))
    low, high = tl.min(tl.where(j < number, key, 2**31 - 1), 0), tl.max(key, 0)
    low = tl.where(k > number, MIN_INT32, low)
    high = tl.where(k > number, MIN_INT32, high)
    while low < high:
        middle = high - ((high.to(tl.int64) - low) // 2).to(tl.int32)
        reach = tl.sum((key >= middle).to(tl.int32), 0)
        low = tl.where(reach >= k, middle, low)
        # a little more than k do as well
        enough = (reach >= k) & (reach <= k + k // 8)
        high = tl.where(reach < k, middle - 1, tl.where(enough, middle, high))
    return tl.where(k > number, float("-inf"), values(low))


@triton.jit
def _floor(
    parts, lists, weights, virtual, at, v, knobs, m, inverse,
    tiling, sizes,
):  # fmt: skip
    """Returns the scaled logit from which tokens are listed, +inf if no filter needs a list."""
    first = first_filter(knobs)
    value = load_knob(knobs, first)
    slack = 1e-3 + tl.abs(m) * 3e-7
    floor = m * 0.0 + float("inf")
    if load_knob(knobs, TEMPERATURE) == 0:
        floor = m
    elif first == 0:
        floor = m * 0.0 + float("inf")
    elif v <= sizes.ROOM:
        floor = m * 0.0 - float("inf")
    elif first == TOP_K:
        k = tl.minimum(tl.maximum(value, load_knob(knobs, KEEP)), MAX_KEEP).to(tl.int32)
        number = parts.splits * tiling.PER_TILE
        floor = (
            _kth_largest(parts.supers + at.to(tl.int64) * number, number, k, tiling.SUPERS)
            * inverse
        )
    elif (first == TOP_P) | (first == TYPICAL_P):
        floor = tl.load(lists.floors + virtual)
    elif first == MIN_P:
        floor = m + log64(tl.maximum(value, 1e-30)).to(tl.float32) - slack
    else:
        z, u = sums_of(weights, virtual, sizes.BLOCKS)
        p = cutoff_of(first == ETA, value, tl.maximum(z, 1), u)
        # the most probable stay, however high the cutoff
        share = tl.minimum(p * z.to(tl.float64) / UNIT, 1.0)
        floor = m + log64(tl.maximum(share, 1e-30)).to(tl.float32) - slack
    return floor


@triton.jit
def _push_both(lists, virtual, marks, s, ids, floor, m, bracket, NUCLEUS: tl.constexpr, sizes):
    """Lists the tokens from the floor up, and separately those of the bracket."""
    good = (s >= floor) & (s > float("-inf"))
    at = virtual.to(tl.int64) * sizes.ROOM
    push(lists.listed + at, lists.listed_ids + at, marks + MARK_LISTED, s, ids, good, sizes.ROOM)
    if NUCLEUS:
        if bracket.stage == BINNED:
            _, within = around(s - m, bracket, sizes.BINS)
            count = marks + MARK_BRACKETED
            push(lists.spare + at, lists.spare_ids + at, count, s, ids, within, sizes.ROOM)


@triton.jit
def _split_tile(
    lists, weights, virtual, marks, row, tile, bracket,
    TILE: tl.constexpr, STEP: tl.constexpr, sizes,
):  # fmt: skip
    """Lists the tokens of the bracket, and sums by block what is above it."""
    at = virtual.to(tl.int64) * sizes.ROOM
    for block in range(
        tile * (TILE // sizes.BLOCK), tl.minimum((tile + 1) * (TILE // sizes.BLOCK), weights.blocks)
    ):
        mass = tl.full([], 0, tl.int64)
        number = tl.full([], 0, tl.int32)
        for i in range(0, sizes.BLOCK, STEP):
            ids = block * sizes.BLOCK + i + tl.arange(0, STEP)
            s = load_scaled(row, ids)
            above, within = around(s - row.m, bracket, sizes.BINS)
            mass += tl.sum(tl.where(above, masses(s - row.m), 0), 0)
            number += tl.sum(above.to(tl.int32), 0)
            count = marks + MARK_BRACKETED
            push(lists.spare + at, lists.spare_ids + at, count, s, ids, within, sizes.ROOM)
        out = virtual.to(tl.int64) * weights.blocks + block
        tl.store(weights.kept_sums + out, mass)
        tl.store(weights.finite + out, number)


@triton.jit
def collect_kernel(
    rows, adaptors, parts, lists, weights,
    tiling, sizes,
    NUCLEUS: tl.constexpr,  # whether a row may have a bracket
):  # fmt: skip
    """Lists the tokens from the floor up, from the groups that reach it or the whole tile."""
    virtual, part = tl.program_id(0), tl.program_id(1)
    at, knobs = knobs_of(adaptors, virtual)
    inverse = inverse_of(load_knob(knobs, TEMPERATURE))
    m = largest_of(parts, at, sizes.SPLITS) * inverse + 0.0
    floor = _floor(
        parts, lists, weights, virtual, at, rows.v, knobs, m, inverse,
        tiling, sizes,
    )  # fmt: skip
    bracket = no_bracket()
    if NUCLEUS:
        first_knob = first_filter(knobs)
        if (first_knob == TOP_P) | (first_knob == TYPICAL_P):
            bracket = bracket_of(
                parts, lists, weights, virtual, at, rows.v, knobs, sizes.SPLITS, sizes.BLOCKS
            )
    row = Row(row_at(rows, at), rows.v, inverse, m)
    marks = marks_of(lists, virtual)
    COLUMNS: tl.constexpr = tiling.COLUMNS
    GROUP: tl.constexpr = tiling.GROUP
    STEP: tl.constexpr = tiling.STEP
    c = tl.arange(0, COLUMNS)
    alone = (bracket.stage == BINNED) & has_one_filter(knobs)
    for tile in range(part, parts.splits, tl.num_programs(1)):
        first = tile * (COLUMNS * GROUP)
        groups = parts.groups + (at.to(tl.int64) * parts.splits + tile) * COLUMNS
        largest = tl.load(groups + c) * inverse
        hit = (largest >= floor) & (largest > float("-inf")) & (alone == 0)
        left = tl.sum(hit.to(tl.int32), 0)
        if NUCLEUS:
            if alone:
                _split_tile(
                    lists, weights, virtual, marks, row, tile, bracket,
                    COLUMNS * GROUP, STEP if STEP < sizes.BLOCK else sizes.BLOCK, sizes,
                )  # fmt: skip
        if left > FEW:
            for i in range(0, COLUMNS * GROUP, STEP):
                ids = first + i + tl.arange(0, STEP)
                s = load_scaled(row, ids)
                _push_both(lists, virtual, marks, s, ids, floor, m, bracket, NUCLEUS, sizes)
        else:
            turn = tl.cumsum(hit.to(tl.int32), 0) - 1
            done = 0
            while done < left:
                wanted = done + tl.arange(0, AT_ONCE)
                here = hit[None, :] & (turn[None, :] == wanted[:, None])
                column = tl.sum(tl.where(here, c[None, :], 0), 1)
                r = tl.arange(0, GROUP)[:, None]
                ids = tl.reshape(first + column[None, :] + r * COLUMNS, (GROUP * AT_ONCE,))
                there = (wanted < left)[None, :] & (r >= 0)
                there = tl.reshape(there, (GROUP * AT_ONCE,))
                s = tl.where(there, load_scaled(row, ids), float("-inf"))
                _push_both(lists, virtual, marks, s, ids, floor, m, bracket, NUCLEUS, sizes)
                done += AT_ONCE
    if part == 0:
        tl.store(lists.floors + virtual, floor)
        if alone:
            tl.atomic_add(marks + MARK_LISTED, tl.full([], 0, tl.int64) + UNLISTED, sem="relaxed")
