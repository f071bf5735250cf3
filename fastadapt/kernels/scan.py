"""The passes over whole rows, each row shared by several programs: maximum, list, masses.

A row's list holds its largest scaled logits, those from a floor up that a sample of the row
suggests. It is a hint: what is decided never depends on it, only how soon.
"""

import triton
import triton.language as tl

from fastadapt.kernels.arithmetic import masses, surprisals
from fastadapt.kernels.bundles import Row
from fastadapt.kernels.rows import (
    KEEP,
    TEMPERATURE,
    TOP_K,
    first_filter,
    inverse_of,
    knobs_of,
    largest_of,
    load_knob,
    load_scaled,
    needs_masses,
    needs_surprisal,
    row_at,
)


@triton.jit
def _list_floor(row, knobs, LIST: tl.constexpr, SAMPLE: tl.constexpr):
    """A scaled logit that some thousand tokens reach: as many as top-k needs, if it is first."""
    at = (tl.arange(0, SAMPLE).to(tl.int64) * row.v) // SAMPLE
    s = load_scaled(row, at)
    share = SAMPLE / row.v.to(tl.float32)
    least = LIST / 4 * share
    k = tl.maximum(load_knob(knobs, TOP_K), load_knob(knobs, KEEP))
    expected = k.to(tl.float32) * share
    wanted = expected + 3.0 * tl.sqrt(expected) + 4.0
    fits = (first_filter(knobs) == TOP_K) & (wanted < LIST * 0.75 * share)
    least = tl.where(fits, wanted, least)
    most = least * 1.5 + 4.0
    finite = s > float("-inf")
    high = tl.max(s, 0)
    low = tl.min(tl.where(finite, s, float("inf")), 0)
    floor = low
    few = tl.sum(finite.to(tl.int32), 0).to(tl.float32) <= most
    step = tl.where(few, 24, 0)
    while step < 24:
        floor = low * 0.5 + high * 0.5
        reach = tl.sum((s >= floor).to(tl.int32), 0).to(tl.float32)
        low = tl.where(reach > most, floor, low)
        high = tl.where(reach < least, floor, high)
        step = tl.where((reach > most) | (reach < least), step + 1, 24)
    return tl.where(few, float("-inf"), floor)


@triton.jit
def scan_kernel(
    rows, adaptors, parts, lists, BLOCK: tl.constexpr, LIST: tl.constexpr, SAMPLE: tl.constexpr
):
    """One read: the largest logit of each part, and the list."""
    virtual, part = tl.program_id(0), tl.program_id(1)
    at, knobs = knobs_of(adaptors, virtual)
    inverse = inverse_of(load_knob(knobs, TEMPERATURE))
    v = rows.v
    row = Row(row_at(rows, at), v, inverse, float("nan"))
    floor = tl.full([], float("-inf"), tl.float32)
    if v > LIST:
        floor = _list_floor(row, knobs, LIST, SAMPLE)
    listed = lists.listed + virtual.to(tl.int64) * LIST
    listed_ids = lists.listed_ids + virtual.to(tl.int64) * LIST
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    nan = tl.full([BLOCK], 0, tl.int32)
    for block in range(part, tl.cdiv(v, BLOCK), parts.splits):
        ids = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(row.logits + ids, mask=ids < v, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, x)
        nan |= (x != x).to(tl.int32)
        s = x * inverse
        hit = (s >= floor) & (s > float("-inf"))
        number = tl.cumsum(hit.to(tl.int32), 0)
        many = tl.max(number, 0)
        if many > 0:
            first = tl.atomic_add(lists.counts + virtual, many, sem="relaxed")
            place = first + number - 1
            hit &= place < LIST
            tl.store(listed + place, s, mask=hit)
            tl.store(listed_ids + place, ids, mask=hit)
    if virtual % adaptors.number == 0:
        most = tl.where(tl.max(nan, 0) > 0, float("nan"), tl.max(largest, 0))
        tl.store(parts.largest + at * parts.splits + part, most)
    if part == 0:
        tl.store(lists.floors + virtual, floor)


@triton.jit
def weigh_kernel(
    rows, adaptors, parts, weights,
    ALWAYS: tl.constexpr, BASE: tl.constexpr, BASE_SURPRISAL: tl.constexpr, BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,  # blocks a program looks at at once
    SPLITS: tl.constexpr,
):  # fmt: skip
    """One read: integer masses of each block, of rows whose first filter needs them, or of all."""
    virtual, part = tl.program_id(0), tl.program_id(1)
    at, knobs = knobs_of(adaptors, virtual)
    needed = needs_masses(first_filter(knobs)) | ALWAYS
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
        inner = tl.arange(0, BLOCK)[None, :]
        for some in range(part, tl.cdiv(weights.blocks, TOGETHER), tl.num_programs(1)):
            block = some * TOGETHER + tl.arange(0, TOGETHER)
            there = block < weights.blocks
            ids = block[:, None] * BLOCK + inner
            s = load_scaled(row, ids)
            d = s - m
            tl.store(weights.sums + out + block, tl.sum(masses(d), 1), mask=there)
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
