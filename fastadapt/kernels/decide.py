"""The filters of an adaptor on one row, by one program: from a row to the law that it leaves."""

import triton
import triton.language as tl

from fastadapt.kernels.arithmetic import (
    ALMOST,
    FINITE_RANK,
    LAST_ID,
    MIN_INT32,
    NEARLY,
    NO_RANK,
    ONE_KEY,
    ceil64,
    exp64,
    exponentials,
    keys,
    log_mass,
    masses,
    ranks,
    surprisals,
    values,
    with_ties,
)
from fastadapt.kernels.bundles import Decision, Found, Law, List, Row
from fastadapt.kernels.rows import (
    EPSILON,
    ETA,
    KEEP,
    MAX_KEEP,
    MIN_P,
    OK,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    TYPICAL_P,
    filter_at,
    first_filter,
    inverse_of,
    is_neutral,
    knobs_of,
    largest_of,
    law_from,
    load_knob,
    load_list,
    load_scaled,
    needs_masses,
    needs_surprisal,
    row_at,
    status_of,
    survives,
)
from fastadapt.kernels.select import cut_of_row, last_before, look


@triton.jit
def found_of(lists, virtual, LIST: tl.constexpr):
    """The list of a virtual row, and its room for another."""
    at = virtual.to(tl.int64) * LIST
    listed = List(lists.listed + at, lists.listed_ids + at)
    spare = List(lists.spare + at, lists.spare_ids + at)
    return Found(tl.load(lists.counts + virtual), tl.load(lists.floors + virtual), listed, spare)


@triton.jit
def _cut(row, law, by_kappa, by_mass, target, found, inside, sizes):
    """A cut, and whether the list held all that decides it."""
    cut = tl.full([], 0, tl.int64)
    usable = found.number <= sizes.LIST
    if usable:
        s, ids = load_list(found.listed, found.number, sizes.LIST)
        alive, _, rank, q, weight = look(s, ids, row.m, law, by_kappa, by_mass)
        # as typical as the floor, below the centre, may also be tokens that are not in the list
        edge = found.floor - row.m + law.centre
        limit = tl.where(edge < 0.0, keys(edge), 2**31 - 1)
        near = keys(q) > tl.where(inside | (by_kappa == 0), MIN_INT32, limit)
        alive &= near
        weight = tl.where(near, weight, 0)
        usable = inside | (tl.sum(weight, 0) >= target)
        if usable:
            cut = last_before(rank, weight, alive, tl.full([], 0, tl.int64), target)
    if usable == 0:
        cut = cut_of_row(
            row, law, by_kappa, by_mass, target, found.spare, sizes.BLOCK, sizes.LIST, sizes.BINS
        )
    return cut, usable


@triton.jit
def _first_largest(row, found, BLOCK: tl.constexpr, LIST: tl.constexpr):
    """The lowest id of the largest scaled logit."""
    best = tl.full([], LAST_ID, tl.int32)
    if found.number <= LIST:
        s, ids = load_list(found.listed, found.number, LIST)
        best = tl.min(tl.where(s == row.m, ids, LAST_ID), 0)
    block = tl.where(best == LAST_ID, 0, tl.cdiv(row.v, BLOCK))
    while block < tl.cdiv(row.v, BLOCK):
        ids = block * BLOCK + tl.arange(0, BLOCK)
        best = tl.min(tl.where(load_scaled(row, ids) == row.m, ids, LAST_ID), 0)
        block = tl.where(best == LAST_ID, block + 1, tl.cdiv(row.v, BLOCK))
    return best


@triton.jit
def _sums(row, law, found, inside, sums, store, BLOCK: tl.constexpr, LIST: tl.constexpr):
    """Mass, surprisal mass and number of the survivors; stores the masses of blocks if asked to."""
    if inside:
        s, ids = load_list(found.listed, found.number, LIST)
        alive = survives(s, ids, row.m, law)
        z = tl.sum(tl.where(alive, masses(s - row.m), 0), 0)
        u = tl.sum(tl.where(alive, surprisals(s - row.m), 0), 0)
        n = tl.sum(alive.to(tl.int32), 0)
    else:
        z = tl.full([], 0, tl.int64)
        all_u = tl.zeros([BLOCK], tl.int64)
        all_n = tl.zeros([BLOCK], tl.int32)
        for block in range(tl.cdiv(row.v, BLOCK)):
            ids = block * BLOCK + tl.arange(0, BLOCK)
            s = load_scaled(row, ids)
            alive = survives(s, ids, row.m, law)
            here = tl.sum(tl.where(alive, masses(s - row.m), 0), 0)
            z += here
            if store:
                tl.store(sums + block, here)
            all_u += tl.where(alive, surprisals(s - row.m), 0)
            all_n += alive.to(tl.int32)
        u, n = tl.sum(all_u, 0), tl.sum(all_n, 0)
    return z, u, n


@triton.jit
def _masses_at(s, ids, row, law, by_kappa, cut):
    """Masses of survivors above a cut, and of those at it."""
    alive, _, rank, _, _ = look(s, ids, row.m, law, by_kappa, by_kappa)
    mass = tl.where(alive, masses(s - row.m), 0)
    rank = tl.where(by_kappa, with_ties(rank), rank)
    return tl.where(rank > cut, mass, 0), tl.where(rank == cut, mass, 0)


@triton.jit
def _at_cut(row, law, by_kappa, cut, found, inside, BLOCK: tl.constexpr, LIST: tl.constexpr):
    """The mass before the last that a cut keeps, and of that: a token, or all equally typical."""
    if inside:
        s, ids = load_list(found.listed, found.number, LIST)
        above, at = _masses_at(s, ids, row, law, by_kappa, cut)
        before, last = tl.sum(above, 0), tl.sum(at, 0)
    else:
        all_above = tl.zeros([BLOCK], tl.int64)
        all_at = tl.zeros([BLOCK], tl.int64)
        for block in range(tl.cdiv(row.v, BLOCK)):
            ids = block * BLOCK + tl.arange(0, BLOCK)
            above, at = _masses_at(load_scaled(row, ids), ids, row, law, by_kappa, cut)
            all_above += above
            all_at += at
        before, last = tl.sum(all_above, 0), tl.sum(all_at, 0)
    return before, last


@triton.jit
def decide(rows, adaptors, parts, lists, weights, ALL_WEIGHED: tl.constexpr, sizes):
    """Runs the filters of the row that this program has, each on the survivors of the one before.

    Where T is 0 no filter runs, and the law leaves the lowest id of the largest logit.
    """
    virtual = tl.program_id(0)
    at, knobs = knobs_of(adaptors, virtual)
    temperature = load_knob(knobs, TEMPERATURE)
    inverse = inverse_of(temperature)
    m = largest_of(parts, at, sizes.SPLITS) * inverse + 0.0
    row = Row(row_at(rows, at), rows.v, inverse, m)
    status = status_of(knobs, m)
    greedy = (status == OK) & (temperature == 0)
    filters = (status == OK) & (temperature > 0)
    keep = tl.minimum(load_knob(knobs, KEEP), MAX_KEEP).to(tl.int64)
    first = first_filter(knobs)
    found = found_of(lists, virtual, sizes.LIST)
    usable = found.number <= sizes.LIST
    inside = usable & (found.floor == float("-inf"))
    listed_from = exponentials(found.floor - m).to(tl.float64) * 1.0001  # masses above are listed

    cut, mass, guard, cutoff, cutoff_guard, band, centre = law_from(FINITE_RANK)
    j = tl.arange(0, sizes.BLOCKS)
    blocks = weights.blocks
    of_row = virtual.to(tl.int64) * blocks
    sums = weights.sums + of_row
    known = needs_masses(first) | ALL_WEIGHED
    known_u = known & needs_surprisal(knobs)
    z = tl.sum(tl.load(sums + j, mask=j < tl.where(known, blocks, 0), other=0), 0)
    u = weights.surprisal_sums + of_row + j
    u = tl.sum(tl.load(u, mask=j < tl.where(known_u, blocks, 0), other=0), 0)
    typical_ran = first < 0  # false
    for i in range(6):
        knob = filter_at(knobs, i)
        value = load_knob(knobs, knob)
        if filters & (is_neutral(knob, value) == 0):
            law = Law(cut, mass, guard, cutoff, cutoff_guard, band, centre)
            is_k, is_p, is_min = knob == TOP_K, knob == TOP_P, knob == MIN_P
            is_typical, is_eta = knob == TYPICAL_P, knob == ETA
            is_cutoff = (knob == EPSILON) | is_eta
            with_u = is_typical | is_eta
            if ((is_p | is_typical | is_cutoff) & (known == 0)) | (with_u & (known_u == 0)):
                z, u, _ = _sums(row, law, found, inside, sums, False, sizes.BLOCK, sizes.LIST)
            total = z.to(tl.float64)
            if is_typical:
                centre = (u.to(tl.float64) / total).to(tl.float32)
                law = Law(cut, mass, guard, cutoff, cutoff_guard, band, centre)
            part_of_z = value * total
            target = ceil64(part_of_z * ALMOST)
            target = tl.where(is_k, tl.minimum(value, MAX_KEEP).to(tl.int64), target)
            target = tl.where(is_k, tl.maximum(target, keep), tl.maximum(target, 1))

            # the cut of the filter itself, and that of the tokens it must leave
            main = guard * 0 + NO_RANK
            least = main
            held = usable
            for turn in range(2):
                second = first * 0 + turn
                asked = is_k | is_p | is_typical
                if second == 1:
                    asked = ((keep > 1) & (is_k == 0)) | (is_cutoff & typical_ran)
                if asked:
                    rank, in_list = _cut(
                        row,
                        law,
                        is_typical,
                        (second == 0) & (is_k == 0),
                        tl.where(second == 0, target, keep),
                        found,
                        inside,
                        sizes,
                    )
                    held = held & in_list
                    main = tl.where(second == 0, rank, main)
                    least = tl.where(second == 1, rank, least)

            main = tl.where(is_k | is_typical, with_ties(main), main)
            # the target was that of light tokens
            heavy = (z + 1023) >> 10
            own = masses(values((main >> 32).to(tl.int32)) - m)
            if is_typical | (is_p & (own >= heavy)):
                before, last = _at_cut(
                    row, law, is_typical, main, found, inside | held, sizes.BLOCK, sizes.LIST
                )
                past = before >= tl.maximum(ceil64(part_of_z * NEARLY), 1)
                past &= last >= heavy
                main += tl.where(past, tl.where(is_typical, ONE_KEY, 1), 0)
            cut = tl.where(is_k | is_p, tl.maximum(cut, tl.minimum(main, least)), cut)
            band = tl.where(is_typical, tl.minimum(main, least), band)
            if is_min:
                mass = ceil64(value.to(tl.float32).to(tl.float64) * 1099511627776.0 * NEARLY)
                guard = least
                held &= mass.to(tl.float64) > listed_from
            if is_cutoff:
                p = value
                if is_eta:
                    entropy = log_mass(z) + u.to(tl.float64) / total
                    p = tl.minimum(p, tl.sqrt(p) * exp64(-entropy))
                cutoff = tl.maximum(cutoff, ceil64(p * total * NEARLY))
                best = with_ties(ranks(keys(m), 0))
                cutoff_guard = tl.where((keep > 1) | typical_ran, with_ties(least), best)
                held &= (
                    cutoff.to(tl.float64) > exponentials(found.floor - m).to(tl.float64) * 1.0001
                )
            inside = inside | held
            typical_ran = typical_ran | is_typical
            known, known_u = first < 0, first < 0
    if greedy:
        cut = ranks(keys(m), _first_largest(row, found, sizes.BLOCK, sizes.LIST))
        inside = usable
    law = Law(cut, mass, guard, cutoff, cutoff_guard, band, centre)
    kept = tl.full([], 0, tl.int32)
    if filters & (first == 0):
        kept = tl.sum(tl.load(weights.finite + of_row + j, mask=j < blocks, other=0), 0)
        inside = first < 0  # the masses of the blocks are there
    elif filters | greedy:
        z, u, kept = _sums(row, law, found, inside, sums, True, sizes.BLOCK, sizes.LIST)
    return Decision(row, law, status, greedy, inside, kept, z)
