"""What decided rows come to without a draw: their bounds, scores, filtered logits, log-odds.

Bounds are written to memory once a row; passes over whole rows, shared by many programs, read them.
"""

import triton
import triton.language as tl

from fastadapt._ops.triton.arithmetic import (
    exp64,
    exponentials,
    log64,
    log_mass,
    masses,
    survives,
)
from fastadapt._ops.triton.bundles import OTHERS_MAX, OTHERS_SUM, Row, row_at
from fastadapt._ops.triton.decide import decide
from fastadapt._ops.triton.rows import (
    ADAPTORS_SHIFT,
    BOUNDS_KEPT,
    BOUNDS_STATUS,
    BOUNDS_TOTAL,
    OK,
    TEMPERATURE,
    follow,
    inverse_of,
    knobs_of,
    largest_of,
    load_bounds,
    load_knob,
    load_scaled,
    marks_of,
    parts_of,
    store_bounds,
    weights_of,
)
from fastadapt._ops.triton.select import found_of, held_of


@triton.jit(do_not_specialize=["packed", "asked"])
def bounds_kernel(rows, packed, asked, scratch, sizes, PDL: tl.constexpr):
    """Stores in its record what a virtual row's filters come to."""
    follow(PDL)
    virtual = tl.program_id(0)
    at, knobs = knobs_of(packed, asked, virtual)
    found = found_of(scratch, virtual, held_of(scratch, virtual, knobs, sizes), sizes)
    parts = parts_of(scratch, asked, at, rows.v, sizes)
    weights = weights_of(scratch, asked, at, virtual, rows.v, sizes)
    decided = decide(rows, knobs, asked, parts, weights, at, found, sizes)
    bounds = marks_of(scratch, virtual) + scratch.BOUNDS
    store_bounds(bounds, decided.bounds, decided.status)
    tl.store(bounds + BOUNDS_TOTAL, decided.total)
    tl.store(bounds + BOUNDS_KEPT, decided.kept.to(tl.int64))


@triton.jit(do_not_specialize=["packed", "asked"])
def score_kernel(rows, packed, asked, scratch, sizes, labels, out, PDL: tl.constexpr):
    """Scores a token under an adaptor, the first program of a row also the base distribution."""
    follow(PDL)
    virtual = tl.program_id(0)
    at, knobs = knobs_of(packed, asked, virtual)
    temperature = load_knob(knobs, TEMPERATURE)
    bounds = marks_of(scratch, virtual) + scratch.BOUNDS
    status, total = tl.load(bounds + BOUNDS_STATUS), tl.load(bounds + BOUNDS_TOTAL)
    kept = tl.load(bounds + BOUNDS_KEPT).to(tl.int32)
    inverse = inverse_of(temperature)
    m1 = largest_of(parts_of(scratch, asked, at, rows.v, sizes), sizes.SPLITS)
    weights = weights_of(scratch, asked, at, virtual, rows.v, sizes)
    row = Row(row_at(rows, at), rows.v, inverse, m1 * inverse + 0.0)
    token = tl.load(labels.ids + at)
    ignored = token == labels.ignore_index
    known = (token >= 0) & (token < row.v)
    x = tl.load(row.logits + tl.where(known, token, 0)).to(tl.float32)
    usable = known & (m1 == m1) & (tl.abs(m1) < float("inf")) & (ignored == 0)
    bad = tl.where(ignored, 0.0, float("nan"))
    j = tl.arange(0, sizes.BLOCKS)
    there = j < weights.blocks
    z = tl.sum(tl.load(weights.base_sums + j, mask=there, other=0), 0)
    log_z = log_mass(tl.where(usable, z, 1))
    base = (x.to(tl.float64) - m1.to(tl.float64) - log_z).to(tl.float32)
    scored = usable & (status == OK) & (temperature != 0)
    s = x * row.inverse
    log_s = log_mass(tl.where(scored, total, 1))
    logprob = (s.to(tl.float64) - row.m.to(tl.float64) - log_s).to(tl.float32)
    alive = survives(s, token.to(tl.int32), row.m, load_bounds(bounds))
    logprob = tl.where(alive, logprob, float("-inf"))
    inverse = inverse.to(tl.float64)
    shift = row.m.to(tl.float64) - m1.to(tl.float64) * inverse
    log_norm = (shift + log_s - log_z * inverse).to(tl.float32)
    tl.store(out.logprobs + virtual, tl.where(scored, logprob, bad))
    tl.store(out.log_norms + virtual, tl.where(scored, log_norm, bad))
    tl.store(out.kept + virtual, tl.where(scored, kept, 0))
    if virtual == at * (asked >> ADAPTORS_SHIFT):
        u = tl.load(weights.base_surprisal_sums + j, mask=there, other=0)
        u = tl.sum(u, 0)
        entropy = (log_z + u.to(tl.float64) / tl.where(usable, z, 1).to(tl.float64)).to(tl.float32)
        tl.store(out.base_logprobs + at, tl.where(usable, base, bad))
        tl.store(out.entropies + at, tl.where(usable, entropy, bad))


@triton.jit
def _exponential(x):
    """Returns e^x in float64 for x <= 0, 0 below -700."""
    return tl.where(x >= -700.0, exp64(tl.maximum(x, -700.0)), 0.0)


@triton.jit
def temperature_of(packed, asked, at):
    """Returns the temperature of a row under the only adaptor."""
    _, knobs = knobs_of(packed, asked, at)
    return load_knob(knobs, TEMPERATURE)


@triton.jit
def fitted(s, m, inverse, TYPE: tl.constexpr):
    """Fits scaled logits into half precision, as `reference.distribution.Distribution.fitted`."""
    if (TYPE == tl.float16) | (TYPE == tl.bfloat16):
        most: tl.constexpr = 65504.0 if TYPE == tl.float16 else 3.3895313892515355e38
        beyond = (inverse > 1) & ((m > most) | (m < -most / 2))
        s = tl.maximum(s - tl.where(beyond, m, 0.0), -most)
    return s


@triton.jit(do_not_specialize=["packed", "asked"])
def filter_kernel(rows, packed, asked, scratch, sizes, out, PDL: tl.constexpr):
    """Writes scaled survivors and -inf for the rest; a bad row is copied."""
    follow(PDL)
    at, block = tl.program_id(0), tl.program_id(1)
    bounds = marks_of(scratch, at) + scratch.BOUNDS
    inverse = inverse_of(temperature_of(packed, asked, at))
    m = largest_of(parts_of(scratch, asked, at, rows.v, sizes), sizes.SPLITS) * inverse + 0.0
    ids = block * sizes.BLOCK + tl.arange(0, sizes.BLOCK)
    x = tl.load(row_at(rows, at) + ids, mask=ids < rows.v, other=float("-inf")).to(tl.float32)
    s = x * inverse
    alive = survives(s, ids, m, load_bounds(bounds))
    kept = tl.where(alive, fitted(s, m, inverse, out.dtype.element_ty), float("-inf"))
    kept = tl.where(tl.load(bounds + BOUNDS_STATUS) == OK, kept, x)
    out += at.to(tl.int64) * rows.v + ids
    tl.store(out, kept.to(out.dtype.element_ty), mask=ids < rows.v)


@triton.jit
def survivors_of(rows, packed, asked, scratch, sizes, at, block):
    """Returns the ids of a block of a row, and which of them survive."""
    inverse = inverse_of(temperature_of(packed, asked, at))
    m = largest_of(parts_of(scratch, asked, at, rows.v, sizes), sizes.SPLITS) * inverse + 0.0
    ids = block * sizes.BLOCK + tl.arange(0, sizes.BLOCK)
    s = load_scaled(Row(row_at(rows, at), rows.v, inverse, m), ids)
    return ids, survives(s, ids, m, load_bounds(marks_of(scratch, at) + scratch.BOUNDS))


@triton.jit(do_not_specialize=["packed", "asked"])
def count_kernel(rows, packed, asked, scratch, sizes, counts, PDL: tl.constexpr):
    """Counts the survivors of a block, (N, blocks)."""
    follow(PDL)
    at, block = tl.program_id(0), tl.program_id(1)
    _, alive = survivors_of(rows, packed, asked, scratch, sizes, at, block)
    place = at.to(tl.int64) * tl.num_programs(1) + block
    tl.store(counts + place, tl.sum(alive.to(tl.int32), 0))


@triton.jit(do_not_specialize=["packed", "asked"])
def ids_kernel(rows, packed, asked, scratch, sizes, starts, out, PDL: tl.constexpr):
    """Lists the survivors of a block from where its ids start, (N, blocks); not where below 0."""
    follow(PDL)
    at, block = tl.program_id(0), tl.program_id(1)
    start = tl.load(starts + at.to(tl.int64) * tl.num_programs(1) + block)
    if start >= 0:
        ids, alive = survivors_of(rows, packed, asked, scratch, sizes, at, block)
        place = start + tl.cumsum(alive.to(tl.int32), 0) - 1
        tl.store(out + place, ids, mask=alive)


@triton.jit
def has_log_odds(labels, token, temperature, status, v):
    """Whether the log-odds of a row's token are a number."""
    good = (status == OK) & (temperature > 0)
    return good & (token >= 0) & (token < v) & (token != labels.ignore_index)


@triton.jit
def store_support(
    row, at, block, ids, s, alive, token, temperature, kept,
    BLOCK: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Writes the survivors of a block, and the largest scaled logit of those other than a token."""
    bits = tl.reshape(alive, (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :]
    bytes_ = (row.v + 7) // 8
    place = block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    here = kept.support + at.to(tl.int64) * bytes_ + place
    tl.store(here, tl.sum(bits, 1).to(tl.uint8), mask=place < bytes_)
    others = (alive > 0) & (ids != token)
    if DOUBLE:
        x = tl.load(row.logits + ids, mask=ids < row.v, other=float("-inf"))
        wide = x / temperature
    else:
        wide = s.to(tl.float64)
    best = tl.max(tl.where(others, wide, float("-inf")), 0)
    tl.store(kept.largest_others + at.to(tl.int64) * kept.blocks + block, best)


@triton.jit(do_not_specialize=["packed", "asked"])
def support_kernel(
    rows, packed, asked, scratch, sizes, labels, kept, DOUBLE: tl.constexpr, PDL: tl.constexpr
):
    """Writes one bit per token, and per block the largest scaled logit of the other survivors."""
    follow(PDL)
    at, block = tl.program_id(0), tl.program_id(1)
    bounds = marks_of(scratch, at) + scratch.BOUNDS
    token, temperature = tl.load(labels.ids + at), temperature_of(packed, asked, at)
    good = has_log_odds(labels, token, temperature, tl.load(bounds + BOUNDS_STATUS), rows.v)
    inverse = inverse_of(temperature)
    m = largest_of(parts_of(scratch, asked, at, rows.v, sizes), sizes.SPLITS) * inverse + 0.0
    row = Row(row_at(rows, at), rows.v, inverse, m)
    ids = block * sizes.BLOCK + tl.arange(0, sizes.BLOCK)
    s = load_scaled(row, ids)
    alive = survives(s, ids, m, load_bounds(bounds)).to(tl.int32) * good.to(tl.int32)
    store_support(row, at, block, ids, s, alive, token, temperature, kept, sizes.BLOCK, DOUBLE)


@triton.jit
def _others(support, ids, v, token):
    """Returns the surviving entries other than the token."""
    byte = tl.load(support + (ids >> 3), mask=ids < v, other=0).to(tl.int32)
    return (((byte >> (ids & 7)) & 1) > 0) & (ids != token)


@triton.jit(do_not_specialize=["packed", "asked"])
def log_odds_kernel(
    rows, packed, asked, scratch, sizes, labels, kept, log_odds, stats,
    DOUBLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Computes a row's log-odds, and the maximum and mass of the other survivors."""
    follow(PDL)
    at = tl.program_id(0)
    token, temperature = tl.load(labels.ids + at), temperature_of(packed, asked, at)
    status = tl.load(marks_of(scratch, at) + scratch.BOUNDS + BOUNDS_STATUS)
    good = has_log_odds(labels, token, temperature, status, rows.v)
    support = kept.support + at.to(tl.int64) * ((rows.v + 7) // 8)
    j = tl.arange(0, sizes.BLOCKS)
    largest = kept.largest_others + at.to(tl.int64) * kept.blocks + j
    m = tl.max(tl.load(largest, mask=j < kept.blocks, other=float("-inf")), 0) + 0.0
    row = Row(row_at(rows, at), rows.v, inverse_of(temperature), m.to(tl.float32))
    y = tl.where(good, token, 0).to(tl.int32)
    inside = ((tl.load(support + (y >> 3)).to(tl.int32) >> (y & 7)) & 1) > 0
    total = tl.full([], 0.0, tl.float64)
    units = tl.full([], 0, tl.int64)
    if inside & (m > float("-inf")):
        for block in range(kept.blocks):
            ids = block * sizes.BLOCK + tl.arange(0, sizes.BLOCK)
            others = _others(support, ids, rows.v, token)
            if DOUBLE:
                x = tl.load(row.logits + ids, mask=others, other=float("-inf"))
                total += tl.sum(_exponential(x / temperature - m), 0)
            else:
                units += tl.sum(tl.where(others, masses(load_scaled(row, ids) - row.m), 0), 0)
    if DOUBLE:
        own = tl.load(row.logits + y) / temperature
    else:
        total = units.to(tl.float64) * 9.094947017729282e-13  # 2^-40
        own = (tl.load(row.logits + y).to(tl.float32) * row.inverse).to(tl.float64)
    of_others = log64(tl.where(total > 0, total, temperature * 0 + 1))
    value = tl.where(total > 0, own - m - of_others, float("inf"))
    value = tl.where(inside, value, float("-inf"))
    value = tl.where(good, value, float("nan"))
    value = tl.where(token == labels.ignore_index, 0.0, value)
    tl.store(log_odds + at, value)
    tl.store(stats + 2 * at + OTHERS_MAX, tl.where(good & inside, m, 0.0))
    tl.store(stats + 2 * at + OTHERS_SUM, tl.where(good & inside, total, 0.0))


@triton.jit(do_not_specialize=["packed", "asked"])
def log_odds_backward_kernel(
    dlog_odds, rows, packed, asked, labels, support, stats, out,
    DOUBLE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Computes dL/dlogits = dL/dm / T (onehot(y) - q), q over the other survivors."""
    follow(PDL)
    at, block = tl.program_id(0), tl.program_id(1)
    token, temperature = tl.load(labels.ids + at), temperature_of(packed, asked, at)
    m, total = tl.load(stats + 2 * at + OTHERS_MAX), tl.load(stats + 2 * at + OTHERS_SUM)
    row = Row(row_at(rows, at), rows.v, inverse_of(temperature), m.to(tl.float32))
    used = (token != labels.ignore_index) & (total > 0)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    others = _others(support + at.to(tl.int64) * ((rows.v + 7) // 8), ids, rows.v, token)
    g = tl.load(dlog_odds + at).to(tl.float64)
    if DOUBLE:
        gain = g / temperature
        x = tl.load(row.logits + ids, mask=others, other=float("-inf"))
        dx = -gain * _exponential(x / temperature - m) / total
    else:
        gain = g * row.inverse.to(tl.float64)
        per_mass = (-gain / total).to(tl.float32)
        dx = per_mass * (exponentials(load_scaled(row, ids) - row.m) * 9.094947017729282e-13)
    dx = tl.where(others, dx, 0.0)
    dx = tl.where(ids == token, gain.to(dx.dtype), dx)
    dx = tl.where(ids * 0 + used.to(tl.int32) > 0, dx, 0.0)
    out += at.to(tl.int64) * rows.v + ids
    tl.store(out, dx.to(out.dtype.element_ty), mask=ids < rows.v)
