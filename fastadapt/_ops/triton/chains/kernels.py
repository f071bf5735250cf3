"""The kernels of chains: one lists a row's survivors, the others read the list.

A record has what they come to: status, mass, number, and their m in the place of a centre.
"""

import triton
import triton.language as tl

from fastadapt._ops.triton.arithmetic import (
    FINITE_RANK,
    NO_RANK,
    bounds_from,
    log_mass,
    random_words,
)
from fastadapt._ops.triton.bundles import Chance, Outcome, Row, row_at
from fastadapt._ops.triton.chains.filters import (
    MIN_K,
    TOP_A,
    TOP_H,
    TOP_N_SIGMA,
    XTC,
    XTC_THRESHOLD,
    filtered,
)
from fastadapt._ops.triton.chains.survivors import (
    as_row,
    best_of,
    drop,
    figures_of,
    is_listed,
    list_of,
    list_row,
    weigh,
    within,
)
from fastadapt._ops.triton.draw import first_by_blocks, store_drawn, target_of
from fastadapt._ops.triton.rows import (
    BAD_KNOB,
    BOUNDS_CENTRE,
    BOUNDS_KEPT,
    BOUNDS_STATUS,
    BOUNDS_TOTAL,
    KEEP,
    LOG_MASS,
    MAX_KEEP,
    NOTHING_FINITE,
    OK,
    POSITIONS,
    POSITIVE_INF,
    TEMPERATURE,
    follow,
    has,
    inverse_of,
    is_neutral,
    knobs_of,
    largest_of,
    lists_of,
    load_float,
    load_knob,
    load_scaled,
    marks_of,
    parts_of,
    status_of,
    store_bounds,
    weights_of,
)
from fastadapt._ops.triton.write import fitted, has_log_odds, store_support, temperature_of

# An integer holds the first seven filters, four bits each; another the rest, and these bits.
FILTER_BITS = tl.constexpr(4)
FIRST_FILTERS = tl.constexpr(7)
MOST_FILTERS = tl.constexpr(11)
LAST = tl.constexpr(1 << 16)  # the temperature divides last
TOSSES = tl.constexpr(1 << 17)  # a row's draw throws the coin of XTC


@triton.jit
def _shapes_in_range(knobs):
    """Whether the knobs of a row are in range that other kernels do not know; NaN never is."""
    sigma, cliff = load_knob(knobs, TOP_N_SIGMA), load_knob(knobs, MIN_K)
    good = (sigma >= 0) & (sigma <= 1e6) & (cliff >= 0) & (cliff <= 1e6)
    a, h = load_knob(knobs, TOP_A), load_knob(knobs, TOP_H)
    good &= (a >= 0) & (a <= 1) & (h >= 0) & (h <= 1)
    p, threshold = load_knob(knobs, XTC), load_knob(knobs, XTC_THRESHOLD)
    return good & (p >= 0) & (p <= 1) & (threshold >= 0) & (threshold <= 1)


@triton.jit
def _tossed(p, asked, rest, seeds, positions, at):
    """Returns whether XTC acts in a row, and whether that is known."""
    excludes, known = p == 1, (p == 0) | (p == 1)
    if has(rest, TOSSES):
        position = tl.load(positions + at, mask=has(asked, POSITIONS), other=0)
        _, _, coin, _ = random_words(tl.load(seeds + at), position)
        excludes, known = coin.to(tl.float64) < p * 4294967296.0, p == p
    return excludes, known


@triton.jit(do_not_specialize=["packed", "asked", "filters", "rest", "seeds", "positions"])
def chain_kernel(
    rows, packed, asked, scratch, sizes,
    lists,  # (virtual rows, 2, V and padding) int32
    filters, rest, seeds, positions,
    SORTED: tl.constexpr,  # tokens that are put in order at once
    PDL: tl.constexpr,
):  # fmt: skip
    """Runs the filters of a virtual row, each on the survivors of the one before, and sums those.

    Where T is 0 what is left is the lowest id of the largest logit: of all, or if the temperature
    comes last of the survivors.
    """
    follow(PDL)
    virtual = tl.program_id(0)
    at, knobs = knobs_of(packed, asked, virtual)
    temperature = load_knob(knobs, TEMPERATURE)
    inverse, one = inverse_of(temperature), tl.full([], 1.0, tl.float32)
    early = tl.where(has(rest, LAST), 1.0, inverse)
    m = largest_of(parts_of(scratch, asked, at, rows.v, sizes), sizes.SPLITS) * early + 0.0
    excludes, known = _tossed(load_knob(knobs, XTC), asked, rest, seeds, positions, at)
    status = tl.where(_shapes_in_range(knobs) & known, status_of(knobs, m), BAD_KNOB)
    keep = tl.minimum(load_knob(knobs, KEEP), MAX_KEEP).to(tl.int64)
    held = list_of(lists, virtual, rows.v)
    listed, spare = lists_of(scratch, virtual, sizes)
    everything = bounds_from(FINITE_RANK)
    any_rank = everything.cut * 0 + NO_RANK
    number, total = tl.full([], 0, tl.int32), tl.full([], 0, tl.int64)
    if status == OK:
        row = Row(row_at(rows, at), rows.v, early, m)
        first = (temperature == 0) & (has(rest, LAST) == 0)
        number = list_row(row, held, first, sizes.BLOCK)
        for turn in range(MOST_FILTERS):
            shift = tl.where(turn < FIRST_FILTERS, turn, turn - FIRST_FILTERS) * FILTER_BITS
            knob = (tl.where(turn < FIRST_FILTERS, filters, rest) >> shift) & 15
            value = load_knob(knobs, knob)
            acts = tl.where(knob == XTC, excludes, is_neutral(knob, value) == 0)
            if (knob > 0) & acts & (keep < number):
                knob = tl.where(knob == XTC, XTC_THRESHOLD, knob)
                value = load_knob(knobs, knob)
                survivors = as_row(held, number, m)
                figures = figures_of(survivors, sizes.BLOCK)
                kept = filtered(knob, value, keep, survivors, figures, spare, listed, sizes, SORTED)
                number, _ = drop(held, number, m, kept.bounds, kept.ceiling, one, sizes.BLOCK)
        if has(rest, LAST) & (temperature == 0):
            best = bounds_from(best_of(as_row(held, number, m), sizes.BLOCK))
            number, _ = drop(held, number, m, best, any_rank, one, sizes.BLOCK)
        if has(rest, LAST) & (inverse != 1.0):
            number, largest = drop(held, number, m, everything, any_rank, inverse, sizes.BLOCK)
            m = largest + 0.0
            status = tl.where(m == float("-inf"), NOTHING_FINITE, status)
            status = tl.where(m == float("inf"), POSITIVE_INF, status)
        if status == OK:
            weights = weights_of(scratch, asked, at, virtual, rows.v, sizes)
            total = weigh(as_row(held, number, m), weights.kept_sums, sizes.BLOCK)
    record = marks_of(scratch, virtual) + scratch.BOUNDS
    store_bounds(record, within(everything, m), status)
    tl.store(record + BOUNDS_TOTAL, total)
    tl.store(record + BOUNDS_KEPT, tl.where(status == OK, number, 0).to(tl.int64))


@triton.jit
def _survivors(rows, scratch, lists, virtual):
    """Returns a virtual row's list, as a row too, and its status."""
    record = marks_of(scratch, virtual) + scratch.BOUNDS
    number = tl.load(record + BOUNDS_KEPT).to(tl.int32)
    held = list_of(lists, virtual, rows.v)
    survivors = as_row(held, number, load_float(record + BOUNDS_CENTRE))
    return held, survivors, tl.load(record + BOUNDS_STATUS).to(tl.int32)


@triton.jit(do_not_specialize=["packed", "asked", "seeds", "positions"])
def draw_kernel(
    rows, packed, asked, scratch, sizes, lists, seeds, positions, out, PDL: tl.constexpr
):
    """Draws from the list of a row."""
    follow(PDL)
    at = tl.program_id(0)
    _, knobs = knobs_of(packed, asked, at)
    temperature = load_knob(knobs, TEMPERATURE)
    inverse = inverse_of(temperature)
    held, survivors, status = _survivors(rows, scratch, lists, at)
    total = tl.load(marks_of(scratch, at) + scratch.BOUNDS + BOUNDS_TOTAL)
    parts = parts_of(scratch, asked, at, rows.v, sizes)
    weights = weights_of(scratch, asked, at, at, rows.v, sizes)
    token = tl.full([], -1, tl.int32)
    if status == OK:
        target = target_of(Chance(seeds, positions), at, total, asked)
        place = first_by_blocks(
            survivors, bounds_from(FINITE_RANK), weights.kept_sums,
            tl.cdiv(survivors.v, sizes.BLOCK), target, sizes.BLOCK, sizes.BLOCKS,
        )  # fmt: skip
        token = tl.load(held.ids + place)
    row = Row(row_at(rows, at), rows.v, inverse, survivors.m)
    greedy = temperature == 0
    outcome = Outcome(status, greedy, survivors.v, total, total, token)
    # of all tokens the largest may be another
    store_drawn(parts, weights, out, at, row, outcome, asked & ~LOG_MASS, sizes)
    if has(asked, LOG_MASS):
        log_kept = survivors.m * 0.0 + float("nan")
        if status == OK:
            j = tl.arange(0, sizes.BLOCKS)
            z = tl.sum(tl.load(weights.sums + j, mask=j < weights.blocks, other=0), 0)
            m = largest_of(parts, sizes.SPLITS) * inverse + 0.0
            log_z = log_mass(z) + (m.to(tl.float64) - survivors.m.to(tl.float64))
            log_kept = tl.where(greedy, 0.0, (log_mass(total) - log_z).to(tl.float32))
        tl.store(out.log_masses + at, log_kept)


@triton.jit(do_not_specialize=["packed", "asked"])
def filter_kernel(rows, packed, asked, scratch, sizes, lists, out, PDL: tl.constexpr):
    """Writes scaled survivors and -inf for the rest; a bad row is copied."""
    follow(PDL)
    at, block = tl.program_id(0), tl.program_id(1)
    held, survivors, status = _survivors(rows, scratch, lists, at)
    inverse = inverse_of(temperature_of(packed, asked, at))
    m = largest_of(parts_of(scratch, asked, at, rows.v, sizes), sizes.SPLITS) * inverse + 0.0
    ids = block * sizes.BLOCK + tl.arange(0, sizes.BLOCK)
    x = tl.load(row_at(rows, at) + ids, mask=ids < rows.v, other=float("-inf")).to(tl.float32)
    alive = is_listed(held, survivors.v, ids)
    kept = tl.where(alive, fitted(x * inverse, m, inverse, out.dtype.element_ty), float("-inf"))
    kept = tl.where(status == OK, kept, x)
    out += at.to(tl.int64) * rows.v + ids
    tl.store(out, kept.to(out.dtype.element_ty), mask=ids < rows.v)


@triton.jit(do_not_specialize=["packed", "asked"])
def ids_kernel(rows, packed, asked, scratch, sizes, lists, starts, out, PDL: tl.constexpr):
    """Copies a block of the ids of a list to where a row's start, (N,); not where below 0."""
    follow(PDL)
    at, block = tl.program_id(0), tl.program_id(1)
    start = tl.load(starts + at)
    if start >= 0:
        held, survivors, _ = _survivors(rows, scratch, lists, at)
        place = block * sizes.BLOCK + tl.arange(0, sizes.BLOCK)
        here = place < survivors.v
        tl.store(out + start + place, tl.load(held.ids + place, mask=here, other=0), mask=here)


@triton.jit(do_not_specialize=["packed", "asked"])
def largest_kernel(rows, packed, asked, scratch, sizes, PDL: tl.constexpr):
    """Makes what the masses of survivors are relative to the largest logit of their row."""
    follow(PDL)
    at = tl.program_id(0)
    parts, j = parts_of(scratch, asked, at, rows.v, sizes), tl.arange(0, sizes.SPLITS)
    m = load_float(marks_of(scratch, at) + scratch.BOUNDS + BOUNDS_CENTRE)
    tl.store(parts.largest + j, m + j.to(tl.float32) * 0.0, mask=j < parts.splits)


@triton.jit(do_not_specialize=["packed", "asked"])
def score_kernel(rows, packed, asked, scratch, sizes, lists, labels, out, PDL: tl.constexpr):
    """Scores the token of a row by its list and its m, where `write.score_kernel` has scored it."""
    follow(PDL)
    virtual = tl.program_id(0)
    at, knobs = knobs_of(packed, asked, virtual)
    held, survivors, _ = _survivors(rows, scratch, lists, virtual)
    if tl.load(out.kept + virtual) > 0:
        token = tl.load(labels.ids + at)
        inverse = inverse_of(load_knob(knobs, TEMPERATURE))
        m1 = largest_of(parts_of(scratch, asked, at, rows.v, sizes), sizes.SPLITS)
        weights = weights_of(scratch, asked, at, virtual, rows.v, sizes)
        j = tl.arange(0, sizes.BLOCKS)
        z = tl.load(weights.base_sums + j, mask=j < weights.blocks, other=0)
        log_z = log_mass(tl.sum(z, 0))
        log_s = log_mass(tl.load(marks_of(scratch, virtual) + scratch.BOUNDS + BOUNDS_TOTAL))
        m = survivors.m.to(tl.float64)
        s = tl.load(row_at(rows, at) + token).to(tl.float32) * inverse
        logprob = (s.to(tl.float64) - m - log_s).to(tl.float32)
        alive = is_listed(held, survivors.v, token.to(tl.int32))
        wide = inverse.to(tl.float64)
        log_norm = (m - m1.to(tl.float64) * wide + log_s - log_z * wide).to(tl.float32)
        tl.store(out.logprobs + virtual, tl.where(alive, logprob, float("-inf")))
        tl.store(out.log_norms + virtual, log_norm)


@triton.jit(do_not_specialize=["packed", "asked"])
def support_kernel(
    rows, packed, asked, scratch, sizes, lists, labels, kept,
    DOUBLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Writes one bit per token, and per block the largest scaled logit of the other survivors."""
    follow(PDL)
    at, block = tl.program_id(0), tl.program_id(1)
    held, survivors, status = _survivors(rows, scratch, lists, at)
    token, temperature = tl.load(labels.ids + at), temperature_of(packed, asked, at)
    good = has_log_odds(labels, token, temperature, status, rows.v)
    row = Row(row_at(rows, at), rows.v, inverse_of(temperature), survivors.m)
    ids = block * sizes.BLOCK + tl.arange(0, sizes.BLOCK)
    alive = is_listed(held, survivors.v, ids).to(tl.int32) * good.to(tl.int32)
    s = load_scaled(row, ids)
    store_support(row, at, block, ids, s, alive, token, temperature, kept, sizes.BLOCK, DOUBLE)
