"""The passes that write under a decided law: filtered logits, and margins with their gradient."""

import triton
import triton.language as tl

from fastadapt.kernels.arithmetic import exp64, exponentials, log64, masses
from fastadapt.kernels.rows import (
    LAW_SIZE,
    LAW_STATUS,
    OK,
    TEMPERATURE,
    inverse_of,
    largest_of,
    load_knob,
    load_law,
    load_scaled,
    survives,
)


@triton.jit
def _exponential(x):
    """e^x in float64 for x <= 0, 0 below -700."""
    return tl.where(x >= -700.0, exp64(tl.maximum(x, -700.0)), 0.0)


@triton.jit
def filter_kernel(
    logits, stride, v, knobs, knob_step, row_step, parts, splits, laws, out,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Survivors scaled, all else -inf; a bad row as it is."""
    at, block = tl.program_id(0), tl.program_id(1)
    row = logits + at.to(tl.int64) * stride
    laws += at.to(tl.int64) * LAW_SIZE
    inverse = inverse_of(load_knob(knobs + at.to(tl.int64) * row_step, TEMPERATURE, knob_step))
    m = largest_of(parts + at * splits, splits, SPLITS) * inverse + 0.0
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(row + ids, mask=ids < v, other=float("-inf")).to(tl.float32)
    s = x * inverse
    kept = tl.where(survives(s, ids, m, load_law(laws)), s, float("-inf"))
    kept = tl.where(tl.load(laws + LAW_STATUS) == OK, kept, x)
    tl.store(out + at.to(tl.int64) * v + ids, kept.to(out.dtype.element_ty), mask=ids < v)


@triton.jit
def _margin_row(at, tokens, ignore_index, knobs, knob_step, row_step, laws, v):
    """Token, 1 / T, T, and whether the row has a margin that is a number."""
    token = tl.load(tokens + at)
    temperature = load_knob(knobs + at.to(tl.int64) * row_step, TEMPERATURE, knob_step)
    good = (tl.load(laws + LAW_STATUS) == OK) & (temperature > 0)
    good &= (token >= 0) & (token < v) & (token != ignore_index)
    return token, inverse_of(temperature), temperature, good


@triton.jit
def support_kernel(
    logits, stride, v, knobs, knob_step, row_step, parts, splits, laws, tokens, ignore_index,
    support, largest_others, blocks,
    DOUBLE: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One bit a token, and the largest scaled logit among the surviving others of each block."""
    at, block = tl.program_id(0), tl.program_id(1)
    row = logits + at.to(tl.int64) * stride
    laws += at.to(tl.int64) * LAW_SIZE
    token, inverse, temperature, good = _margin_row(
        at, tokens, ignore_index, knobs, knob_step, row_step, laws, v
    )
    m = largest_of(parts + at * splits, splits, SPLITS) * inverse + 0.0
    ids = block * BLOCK + tl.arange(0, BLOCK)
    s = load_scaled(row, ids, v, inverse)
    alive = survives(s, ids, m, load_law(laws)).to(tl.int32) * good.to(tl.int32)
    bits = tl.reshape(alive, (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :]
    bytes_ = (v + 7) // 8
    place = block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    here = support + at.to(tl.int64) * bytes_ + place
    tl.store(here, tl.sum(bits, 1).to(tl.uint8), mask=place < bytes_)
    others = (alive > 0) & (ids != token)
    if DOUBLE:
        wide = tl.load(row + ids, mask=ids < v, other=float("-inf")) / temperature
    else:
        wide = s.to(tl.float64)
    best = tl.max(tl.where(others, wide, float("-inf")), 0)
    tl.store(largest_others + at.to(tl.int64) * blocks + block, best)


@triton.jit
def _others(row, support, ids, v, token):
    """The surviving lanes other than the token."""
    byte = tl.load(support + (ids >> 3), mask=ids < v, other=0).to(tl.int32)
    return (((byte >> (ids & 7)) & 1) > 0) & (ids != token)


@triton.jit
def margin_kernel(
    logits, stride, v, knobs, knob_step, row_step, laws, tokens, ignore_index,
    support, largest_others, blocks, margins, stats,
    DOUBLE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The margin of a row, and the maximum and mass of its others."""
    at = tl.program_id(0)
    row = logits + at.to(tl.int64) * stride
    token, inverse, temperature, good = _margin_row(
        at, tokens, ignore_index, knobs, knob_step, row_step, laws + at.to(tl.int64) * LAW_SIZE, v
    )
    support += at.to(tl.int64) * ((v + 7) // 8)
    j = tl.arange(0, BLOCKS)
    largest = largest_others + at.to(tl.int64) * blocks + j
    m = tl.max(tl.load(largest, mask=j < blocks, other=float("-inf")), 0) + 0.0
    y = tl.where(good, token, 0).to(tl.int32)
    inside = ((tl.load(support + (y >> 3)).to(tl.int32) >> (y & 7)) & 1) > 0
    total = tl.full([], 0.0, tl.float64)
    units = tl.full([], 0, tl.int64)
    if inside & (m > float("-inf")):
        for block in range(blocks):
            ids = block * BLOCK + tl.arange(0, BLOCK)
            others = _others(row, support, ids, v, token)
            if DOUBLE:
                x = tl.load(row + ids, mask=others, other=float("-inf"))
                total += tl.sum(_exponential(x / temperature - m), 0)
            else:
                d = load_scaled(row, ids, v, inverse) - m.to(tl.float32)
                units += tl.sum(tl.where(others, masses(d), 0), 0)
    if DOUBLE:
        own = tl.load(row + y) / temperature
    else:
        total = units.to(tl.float64) * 9.094947017729282e-13  # 2^-40
        own = (tl.load(row + y).to(tl.float32) * inverse).to(tl.float64)
    of_others = log64(tl.where(total > 0, total, temperature * 0 + 1))
    margin = tl.where(total > 0, own - m - of_others, float("inf"))
    margin = tl.where(inside, margin, float("-inf"))
    margin = tl.where(good, margin, float("nan"))
    margin = tl.where(token == ignore_index, 0.0, margin)
    tl.store(margins + at, margin)
    tl.store(stats + 2 * at, tl.where(good & inside, m, 0.0))
    tl.store(stats + 2 * at + 1, tl.where(good & inside, total, 0.0))


@triton.jit
def margin_backward_kernel(
    dmargins, logits, stride, v, knobs, knob_step, row_step, tokens, ignore_index, support, stats,
    out, DOUBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dL/dlogits = dL/dm / T (onehot(y) - q), q the law of the surviving others."""
    at, block = tl.program_id(0), tl.program_id(1)
    row = logits + at.to(tl.int64) * stride
    token = tl.load(tokens + at)
    temperature = load_knob(knobs + at.to(tl.int64) * row_step, TEMPERATURE, knob_step)
    inverse = inverse_of(temperature)
    m, total = tl.load(stats + 2 * at), tl.load(stats + 2 * at + 1)
    used = (token != ignore_index) & (total > 0)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    others = _others(row, support + at.to(tl.int64) * ((v + 7) // 8), ids, v, token)
    g = tl.load(dmargins + at).to(tl.float64)
    if DOUBLE:
        gain = g / temperature
        x = tl.load(row + ids, mask=others, other=float("-inf"))
        dx = -gain * _exponential(x / temperature - m) / total
    else:
        gain = g * inverse.to(tl.float64)
        per_mass = (-gain / total).to(tl.float32)
        d = load_scaled(row, ids, v, inverse) - m.to(tl.float32)
        dx = per_mass * (exponentials(d) * 9.094947017729282e-13)
    dx = tl.where(others, dx, 0.0)
    dx = tl.where(ids == token, gain.to(dx.dtype), dx)
    dx = tl.where(ids * 0 + used.to(tl.int32) > 0, dx, 0.0)
    tl.store(out + at.to(tl.int64) * v + ids, dx.to(out.dtype.element_ty), mask=ids < v)
