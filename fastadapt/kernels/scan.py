"""The passes over whole rows, each row shared by several programs: maximum, list, masses.

A row's list holds its largest scaled logits, those from a floor up that a sample of the row
suggests. It is a hint: what is decided never depends on it, only how soon.
"""

import triton
import triton.language as tl

from fastadapt.kernels.arithmetic import masses, surprisals
from fastadapt.kernels.rows import (
    KEEP,
    TEMPERATURE,
    TOP_K,
    first_filter,
    inverse_of,
    largest_of,
    load_knob,
    load_scaled,
    needs_masses,
    needs_surprisal,
)


@triton.jit
def knobs_of(knobs, row, adaptors, knob_step, row_step):
    """The row of logits and the knobs that a virtual row stands for: one for each adaptor."""
    adaptor = row % adaptors
    at = row // adaptors
    return at, knobs + adaptor.to(tl.int64) * 8 * knob_step + at.to(tl.int64) * row_step


@triton.jit
def _list_floor(row, v, inverse, knobs, knob_step, vllm, LIST: tl.constexpr, SAMPLE: tl.constexpr):
    """A scaled logit that some thousand tokens reach: as many as top-k needs, if it is first."""
    at = (tl.arange(0, SAMPLE).to(tl.int64) * v) // SAMPLE
    s = load_scaled(row, at, v, inverse)
    share = SAMPLE / v.to(tl.float32)
    least = LIST / 4 * share
    first = first_filter(knobs, knob_step, vllm)
    k = tl.maximum(load_knob(knobs, TOP_K, knob_step), load_knob(knobs, KEEP, knob_step))
    expected = k.to(tl.float32) * share
    wanted = expected + 3.0 * tl.sqrt(expected) + 4.0
    fits = (first == TOP_K) & (wanted < LIST * 0.75 * share)
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
    logits,
    stride,
    v,
    knobs,
    adaptors,
    knob_step,
    row_step,
    vllm,
    parts,  # (rows, splits) float32: largest logit of each part, NaN if one is
    counts,  # (virtual rows,) int32, zeroed: tokens from the floor up
    listed,  # (virtual rows, LIST) float32 and int32
    listed_ids,
    floors,  # (virtual rows,) float32
    splits,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    """One read: the largest logit of each part, and the list."""
    virtual, part = tl.program_id(0), tl.program_id(1)
    at, knobs = knobs_of(knobs, virtual, adaptors, knob_step, row_step)
    row = logits + at.to(tl.int64) * stride
    inverse = inverse_of(load_knob(knobs, TEMPERATURE, knob_step))
    floor = tl.full([], float("-inf"), tl.float32)
    if v > LIST:
        floor = _list_floor(row, v, inverse, knobs, knob_step, vllm, LIST, SAMPLE)
    listed += virtual.to(tl.int64) * LIST
    listed_ids += virtual.to(tl.int64) * LIST
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    nan = tl.full([BLOCK], 0, tl.int32)
    for block in range(part, tl.cdiv(v, BLOCK), splits):
        ids = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(row + ids, mask=ids < v, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, x)
        nan |= (x != x).to(tl.int32)
        s = x * inverse
        hit = (s >= floor) & (s > float("-inf"))
        number = tl.cumsum(hit.to(tl.int32), 0)
        many = tl.max(number, 0)
        if many > 0:
            first = tl.atomic_add(counts + virtual, many, sem="relaxed")
            place = first + number - 1
            hit &= place < LIST
            tl.store(listed + place, s, mask=hit)
            tl.store(listed_ids + place, ids, mask=hit)
    if virtual % adaptors == 0:
        most = tl.where(tl.max(nan, 0) > 0, float("nan"), tl.max(largest, 0))
        tl.store(parts + at * splits + part, most)
    if part == 0:
        tl.store(floors + virtual, floor)


@triton.jit
def weigh_kernel(
    logits,
    stride,
    v,
    knobs,
    adaptors,
    knob_step,
    row_step,
    vllm,
    parts,
    splits,
    sums,  # (virtual rows, blocks) int64: masses of a block, and masses times -d
    surprisal_sums,
    base_sums,  # (rows, blocks): the same at temperature 1
    base_surprisal_sums,
    finite,  # (virtual rows, blocks) int32
    blocks,
    ALWAYS: tl.constexpr,
    BASE: tl.constexpr,
    BASE_SURPRISAL: tl.constexpr,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,  # blocks a program looks at at once
    SPLITS: tl.constexpr,
):
    """One read: integer masses of each block, of rows whose first filter needs them, or of all."""
    virtual, part = tl.program_id(0), tl.program_id(1)
    at, knobs = knobs_of(knobs, virtual, adaptors, knob_step, row_step)
    needed = needs_masses(first_filter(knobs, knob_step, vllm)) | ALWAYS
    with_surprisal = needs_surprisal(knobs, knob_step)
    with_base = virtual % adaptors == 0
    if needed:
        row = logits + at.to(tl.int64) * stride
        inverse = inverse_of(load_knob(knobs, TEMPERATURE, knob_step))
        largest = largest_of(parts + at * splits, splits, SPLITS)
        m = largest * inverse + 0.0
        out = virtual.to(tl.int64) * blocks
        base_out = at.to(tl.int64) * blocks
        inner = tl.arange(0, BLOCK)[None, :]
        for some in range(part, tl.cdiv(blocks, TOGETHER), tl.num_programs(1)):
            block = some * TOGETHER + tl.arange(0, TOGETHER)
            there = block < blocks
            ids = block[:, None] * BLOCK + inner
            s = load_scaled(row, ids, v, inverse)
            d = s - m
            tl.store(sums + out + block, tl.sum(masses(d), 1), mask=there)
            number = tl.sum((s > float("-inf")).to(tl.int32), 1)
            tl.store(finite + out + block, number, mask=there)
            if with_surprisal:
                tl.store(surprisal_sums + out + block, tl.sum(surprisals(d), 1), mask=there)
            if BASE:
                if with_base:
                    d1 = load_scaled(row, ids, v, 1.0) - (largest + 0.0)
                    tl.store(base_sums + base_out + block, tl.sum(masses(d1), 1), mask=there)
                    if BASE_SURPRISAL:
                        u1 = tl.sum(surprisals(d1), 1)
                        tl.store(base_surprisal_sums + base_out + block, u1, mask=there)
