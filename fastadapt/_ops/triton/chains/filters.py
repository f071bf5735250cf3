"""One filter of a chain on the survivors of those before: from a list to the bounds of what stays.

One cut among the survivors is searched after the other, at one place of the code: those that
explore where sorted logits fall, that of the filter itself, that of the tokens it must leave.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastadapt._ops.triton.arithmetic import (
    ANY_RANK,
    FINITE_RANK,
    LAST_ID,
    NEARLY,
    NO_RANK,
    ONE_KEY,
    bounds_from,
    ceil64,
    cutoff_of,
    keys,
    log_mass,
    mass_target,
    masses,
    ranks,
    surprisals,
    values,
    with_ties,
)
from fastadapt._ops.triton.bundles import Bounds
from fastadapt._ops.triton.chains.survivors import deviation_of, gather, tokens_in, within
from fastadapt._ops.triton.decide import masses_at
from fastadapt._ops.triton.rows import EPSILON, ETA, MAX_KEEP, MIN_P, TOP_K, TOP_P, TYPICAL_P
from fastadapt._ops.triton.select import cut_among

TOP_N_SIGMA = tl.constexpr(8)
MIN_K = tl.constexpr(9)
TOP_A = tl.constexpr(10)
TOP_H = tl.constexpr(11)
XTC = tl.constexpr(12)  # its probability
XTC_THRESHOLD = tl.constexpr(13)
MORE = tl.constexpr(1 + 2.0**-19)
ENTROPY_OF = tl.constexpr(100)  # tokens that top-h looks at

# The cuts of a filter, in turn.
EXPLORE = tl.constexpr(0)  # the next of the best, for min-k
MAIN = tl.constexpr(1)
LEAST = tl.constexpr(2)  # min_tokens_to_keep
DONE = tl.constexpr(3)


class Cliff(NamedTuple):
    """How far sorted logits are looked at, and where they fall most."""

    seen: Any  # all but the last of these tokens
    last: Any  # the rank of the last
    steepest: Any  # fall divided by the number of tokens above it
    above: Any  # that number


class Kept(NamedTuple):
    """What a filter keeps."""

    bounds: Bounds
    ceiling: Any  # the highest rank that stays


@triton.jit
def _best_of(row, lowest, highest, out, sizes, SORTED: tl.constexpr):
    """Returns the ranks between two, the best first, and their number, at most `SORTED`."""
    number = gather(row, lowest, highest, out, sizes.BLOCK)
    j = tl.arange(0, SORTED)
    s = tl.load(out.s + j, mask=j < number, other=float("-inf"))
    at = tl.load(out.ids + j, mask=j < number, other=0)
    return tl.sort(tl.where(j < number, ranks(keys(s), at), ANY_RANK), descending=True), number


@triton.jit
def _look(cliff, best, number, lowest, low, out, SORTED: tl.constexpr):
    """Looks at more of the sorted logits, the first of which was the last of those before."""
    j = tl.arange(0, SORTED)
    s = values((best >> 32).to(tl.int32))
    tl.debug_barrier()  # the list may still be read
    tl.store(out.s + j, s, mask=j < number)
    tl.debug_barrier()
    below = tl.load(out.s + j + 1, mask=j + 1 < number, other=0.0)
    above = cliff.seen + 1 + j
    share = (s.to(tl.float64) - below.to(tl.float64)) / above.to(tl.float64)
    share = tl.where(j + 1 < number, share, -1.0)
    most = tl.max(share, 0)
    first = tl.min(tl.where(share == most, above, LAST_ID), 0)
    better = most > cliff.steepest
    seen = cliff.seen + number
    last = tl.min(tl.where(j < number, s, float("inf")), 0)
    rest = (last.to(tl.float64) - low.to(tl.float64)) / seen.to(tl.float64)
    steepest = tl.maximum(most, cliff.steepest)
    found = Cliff(seen - 1, lowest, steepest, tl.where(better, first, cliff.above))
    return found, steepest >= rest


@triton.jit
def _by_entropy(best, number, m, h, SORTED: tl.constexpr):
    """Returns the lowest of sorted ranks that have, with those before, h of their entropy."""
    j = tl.arange(0, SORTED)
    d = values((best >> 32).to(tl.int32)) - m
    w = tl.where(j < number, masses(d), 0)
    u = tl.where(j < number, surprisals(d), 0)
    z = tl.sum(w, 0)
    log_z = log_mass(tl.maximum(z, 1))
    # Z times the entropy of a share: sum of u + w ln(Z / 2^40)
    share = tl.cumsum(u, 0).to(tl.float64) + tl.cumsum(w, 0).to(tl.float64) * log_z
    whole = tl.sum(u, 0).to(tl.float64) + z.to(tl.float64) * log_z
    inside = (j < number) & (w >= 1) & (share <= h * whole * MORE)
    count = tl.min(tl.where(inside | (j == 0), SORTED, j), 0)
    return tl.sum(tl.where(j == count - 1, best, 0), 0)


@triton.jit
def _at_cut(row, bounds, by_kappa, cut, BLOCK: tl.constexpr):
    """Returns the mass above the last token that a cut keeps, and that of the token or its ties."""
    above, last = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    for block in range(tl.cdiv(row.v, BLOCK)):
        at = block * BLOCK + tl.arange(0, BLOCK)
        s = tl.load(row.logits + at, mask=at < row.v, other=float("-inf"))
        more_above, more_at = masses_at(s, at, row, bounds, by_kappa, cut)
        above += more_above
        last += more_at
    return tl.sum(above, 0), tl.sum(last, 0)


@triton.jit
def _least_of_many(row, mass, BLOCK: tl.constexpr):
    """Returns the lowest rank of tokens with a mass, their number, and how many rank higher."""
    lowest, many = tl.full([BLOCK], NO_RANK, tl.int64), tl.zeros([BLOCK], tl.int32)
    for block in range(tl.cdiv(row.v, BLOCK)):
        at = block * BLOCK + tl.arange(0, BLOCK)
        s = tl.load(row.logits + at, mask=at < row.v, other=float("-inf"))
        reaches = masses(s - row.m) >= mass
        lowest = tl.minimum(lowest, tl.where(reaches, ranks(keys(s), at), NO_RANK))
        many += reaches.to(tl.int32)
    last = tl.min(lowest, 0)
    better = tl.zeros([BLOCK], tl.int32)
    for block in range(tl.cdiv(row.v, BLOCK)):
        at = block * BLOCK + tl.arange(0, BLOCK)
        s = tl.load(row.logits + at, mask=at < row.v, other=float("-inf"))
        better += (ranks(keys(s), at) > last).to(tl.int32)
    return last, tl.sum(many, 0), tl.sum(better, 0)


@triton.jit
def filtered(knob, value, keep, row, figures, spare, listed, sizes, SORTED: tl.constexpr):
    """Returns what a filter keeps of more survivors than it must leave, which `row` holds."""
    none = bounds_from(FINITE_RANK)
    cut, mass, guard, cutoff, cutoff_guard, band, centre = none
    ceiling = cut * 0 + NO_RANK
    z, u, top, low, heaviest = figures
    number, total = row.v, z.to(tl.float64)
    part_of_z = tl.minimum(value, 1.0) * total  # a share of Z, or of no use
    is_k, is_p, is_typical = knob == TOP_K, knob == TOP_P, knob == TYPICAL_P
    is_sigma, is_cliff, is_h = knob == TOP_N_SIGMA, knob == MIN_K, knob == TOP_H
    is_min, is_a, is_eta, is_xtc = knob == MIN_P, knob == TOP_A, knob == ETA, knob == XTC_THRESHOLD
    is_cutoff = (knob == EPSILON) | is_eta
    if is_typical:
        centre = (u.to(tl.float64) / tl.maximum(z, 1).to(tl.float64)).to(tl.float32)
    bounds = within(none, centre)

    span = top.to(tl.float64) - low.to(tl.float64)
    of_span = value / tl.where(span > 0, span, 1.0)
    explores = is_cliff & (span > 0) & (of_span < number.to(tl.float64))
    of_span = tl.where(explores, of_span, 0.0).to(tl.int64)
    minimum = is_p | is_min | is_typical | is_cutoff | is_sigma | is_a | is_h
    minimum &= keep > 1
    main, least = ceiling, ceiling
    cliff = Cliff(number * 0, ceiling, total * 0.0, number * 0)
    phase = tl.where(explores, EXPLORE, MAIN)
    while phase < DONE:
        wanted = tl.minimum(value, MAX_KEEP).to(tl.int64)
        wanted = tl.where(is_k, tl.maximum(wanted, keep), mass_target(part_of_z))
        wanted = tl.where(is_h, ENTROPY_OF, wanted)
        of_cliff = tl.maximum(cliff.above.to(tl.int64), of_span)
        wanted = tl.where(is_cliff, tl.maximum(of_cliff, keep), wanted)
        wanted = tl.where(phase == EXPLORE, cliff.seen + SORTED, wanted)
        wanted = tl.where(phase == LEAST, keep, wanted)
        by_mass = (phase == MAIN) & (is_p | is_typical)
        searched = is_k | is_p | is_typical | is_h | explores
        searched = tl.where(phase == LEAST, minimum, searched)
        rank = ceiling * 0 + FINITE_RANK
        if searched & (by_mass | (wanted < number)):
            rank = cut_among(
                tokens_in(row, spare), bounds, is_typical, by_mass, wanted, spare,
                sizes.STEP, sizes.LIST, sizes.BINS,
            )  # fmt: skip
        after = phase + 1
        if (phase == EXPLORE) | (is_h & (phase == MAIN)):
            best, some = _best_of(row, rank, cliff.last, listed, sizes, SORTED)
            if phase == EXPLORE:
                cliff, enough = _look(cliff, best, some, rank, low, listed, SORTED)
                after = tl.where(enough, MAIN, EXPLORE)
            else:
                rank = _by_entropy(best, some, row.m, value, SORTED)
        main = tl.where((phase == MAIN) & searched, rank, main)
        least = tl.where((phase == LEAST) & searched, rank, least)
        phase = after

    main = tl.where(is_k | is_typical, with_ties(main), main)
    own = masses(values((main >> 32).to(tl.int32)) - row.m)
    heavy = (z + 1023) >> 10
    if is_typical | (is_p & (own >= heavy)):  # the target was that of light tokens
        before, last = _at_cut(row, bounds, is_typical, main, sizes.BLOCK)
        past = (before >= tl.maximum(ceil64(part_of_z * NEARLY), 1)) & (last >= heavy)
        main += tl.where(past, tl.where(is_typical, ONE_KEY, 1), 0)
    if is_sigma:
        below = value * deviation_of(row, low, sizes.BLOCK)
        key = (top.to(tl.float64) - below * MORE).to(tl.float32)
        main = with_ties(ranks(keys(key), number * 0))
    if is_k | is_p | is_sigma | is_cliff | is_h:
        cut = tl.minimum(main, least)
        cut = tl.where(is_cliff & (explores == 0), FINITE_RANK, cut)
    if is_typical:
        band = tl.minimum(main, least)
    of_top = heaviest.to(tl.float64)
    if is_min:
        mass, guard = ceil64(value.to(tl.float32).to(tl.float64) * of_top * NEARLY), least
    if is_a:
        mass, guard = ceil64(value * (of_top / total) * of_top * NEARLY), least
    if is_cutoff:
        mass = ceil64(cutoff_of(is_eta, value, tl.maximum(z, 1), u) * total * NEARLY)
        guard = with_ties(tl.where(keep > 1, least, ranks(keys(top), number * 0)))
    if is_xtc & (value <= 0.5):
        wanted = tl.maximum(ceil64(part_of_z * NEARLY), 1)
        last, many, better = _least_of_many(row, wanted, sizes.BLOCK)
        several = (many > 1) & (better > 0) & (number - better >= keep)
        ceiling = tl.where(several, last, ceiling)
    return Kept(Bounds(cut, mass, guard, cutoff, cutoff_guard, band, centre), ceiling)
