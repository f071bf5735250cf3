"""The filters of an adaptor on one row, by one program: from a row to its bounds."""

import triton
import triton.language as tl

from fastadapt._ops.triton.arithmetic import (
    ANY_RANK,
    FINITE_RANK,
    LAST_ID,
    MIN_INT32,
    NEARLY,
    NO_RANK,
    ONE_KEY,
    ceil64,
    exponentials,
    keys,
    masses,
    ranks,
    surprisals,
    values,
    with_ties,
)
from fastadapt._ops.triton.bundles import Bounds, Decision, Found, Held, List, Row, row_at
from fastadapt._ops.triton.nucleus import ID_BITS
from fastadapt._ops.triton.rows import (
    BINNED,
    BRACKET_LISTED,
    DECIDED,
    EPSILON,
    ETA,
    KEEP,
    MARK_ABOVE,
    MARK_BRACKETED,
    MARK_LISTED,
    MARK_LOW,
    MARK_STAGE,
    MARK_WITHIN,
    MAX_KEEP,
    MIN_P,
    OK,
    ONE_KAPPA,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    TYPICAL_P,
    UNDECIDED,
    UNLISTED,
    UNSUMMED,
    bounds_from,
    cutoff_of,
    filter_at,
    first_filter,
    has_one_filter,
    inverse_of,
    is_neutral,
    knobs_of,
    largest_of,
    load_knob,
    load_list,
    load_scaled,
    marks_of,
    mass_target,
    needs_masses,
    needs_surprisal,
    status_of,
    survives,
)
from fastadapt._ops.triton.select import cut_of_row, first_ranks, last_before, look


@triton.jit
def held_of(lists, virtual, knobs, sizes):
    """Chooses the list of a virtual row to work on, and says whether it fits one program.

    The list from its floor up, or that of its bracket: where the other has no room, or where the
    only filter needs no more, since then its survivors are summed by many programs.
    """
    marks = marks_of(lists, virtual)
    number = tl.load(marks + MARK_LISTED)
    stage = tl.load(marks + MARK_STAGE).to(tl.int32)
    bracketed = tl.load(marks + MARK_BRACKETED)
    one = stage == ONE_KAPPA
    bracketed = tl.where(one, 0, bracketed)
    few = ((stage == BINNED) & (bracketed <= sizes.ROOM)) | (stage == BRACKET_LISTED) | one
    few &= bracketed <= sizes.LIST
    partial = few & ((number > sizes.ROOM) | ((number > sizes.LIST) & has_one_filter(knobs)))
    listed = number
    number = tl.minimum(tl.where(partial, bracketed, number), 2**31 - 1).to(tl.int32)
    key = (tl.load(marks + MARK_LOW) >> ID_BITS).to(tl.int32)
    return Held(
        number,
        partial,
        partial & (stage == BINNED) & (listed >= UNLISTED),
        tl.load(marks + MARK_ABOVE),
        tl.load(marks + MARK_WITHIN),
        one,
        ranks(key, key * 0),
    )


@triton.jit
def load_held(held, listed, spare, sizes):
    """Loads the chosen list: scaled logits and ids."""
    s, ids = load_list(listed, tl.where(held.partial, 0, held.number), sizes.LIST)
    if held.partial:
        s, ids = load_list(spare, held.number, sizes.LIST)
    return s, ids


@triton.jit
def found_of(lists, virtual, held, sizes):
    """Loads the list of a virtual row, with the address of a spare one."""
    at = virtual.to(tl.int64) * sizes.ROOM
    listed = List(lists.listed + at, lists.listed_ids + at)
    spare = List(lists.spare + at, lists.spare_ids + at)
    floor = tl.load(lists.floors + virtual)
    s, ids = floor, held.number
    if sizes.ALONE:
        s, ids = load_held(held, listed, spare, sizes)
        there = tl.arange(0, sizes.LIST) < held.number
        rank = tl.sort(tl.where(there, ranks(keys(s), ids), ANY_RANK), descending=True)
        s = tl.where(there, values((rank >> 32).to(tl.int32)), float("-inf"))
        ids = tl.where(there, LAST_ID - (rank & 0xFFFFFFFF).to(tl.int32), 0)
    return Found(held, floor, s, ids, listed, spare)


@triton.jit
def tokens_of(found, sizes):
    """Returns scaled logits and ids of a list; an unsorted one is loaded anew for each use."""
    s, ids = found.s, found.ids
    if sizes.ALONE == 0:  # else the kernel would hold more than it has registers for
        s, ids = load_held(found.held, found.listed, found.spare, sizes)
    return s, ids


@triton.jit
def _cut(row, bounds, by_kappa, by_mass, target, found, inside, partial, sizes):
    """Finds a cut in a list, and says whether the list was enough to decide it."""
    cut = tl.full([], 0, tl.int64)
    above = tl.where(partial, found.held.above, 0)
    usable = (found.held.number <= sizes.LIST) & (partial | (found.held.partial == 0))
    if usable:
        s, ids = tokens_of(found, sizes)
        alive, _, rank, q, weight = look(s, ids, row.m, bounds, by_kappa, by_mass)
        # as typical as the floor, below the centre, may also be tokens that are not in the list
        edge = found.floor - row.m + bounds.centre
        limit = tl.where(edge < 0.0, keys(edge), 2**31 - 1)
        near = keys(q) > tl.where(inside | partial | (by_kappa == 0), MIN_INT32, limit)
        alive &= near
        weight = tl.where(near, weight, 0)
        usable = inside | partial | (tl.sum(weight, 0) >= target)
        if usable:
            if sizes.ALONE:
                if by_kappa:
                    cut = last_before(rank, weight, alive, above, target)
                else:
                    cut = first_ranks(rank, weight, alive, above, target)
            else:
                cut = last_before(rank, weight, alive, above, target)
            cut = tl.where(partial & found.held.one, found.held.rank, cut)
    lost = usable == 0
    if sizes.ALONE == 0:
        if lost:
            cut = cut_of_row(
                row, bounds, by_kappa, by_mass, target, found.spare,
                sizes.BLOCK, sizes.ROOM, sizes.BINS,
            )  # fmt: skip
    return cut, usable & (partial == 0), lost


@triton.jit
def _first_largest(row, found, sizes):
    """Returns the lowest id of the largest scaled logit, `LAST_ID` if the list cannot tell."""
    best = tl.full([], LAST_ID, tl.int32)
    if (found.held.number <= sizes.LIST) & (found.held.partial == 0):
        s, ids = tokens_of(found, sizes)
        best = tl.min(tl.where(s == row.m, ids, LAST_ID), 0)
    if sizes.ALONE == 0:
        block = tl.where(best == LAST_ID, 0, tl.cdiv(row.v, sizes.BLOCK))
        while block < tl.cdiv(row.v, sizes.BLOCK):
            ids = block * sizes.BLOCK + tl.arange(0, sizes.BLOCK)
            best = tl.min(tl.where(load_scaled(row, ids) == row.m, ids, LAST_ID), 0)
            block = tl.where(best == LAST_ID, block + 1, tl.cdiv(row.v, sizes.BLOCK))
    return best


@triton.jit
def _sums_of_row(row, bounds, sums, store, BLOCK: tl.constexpr):
    """Sums mass, surprisal mass and number of a row's survivors, also by block if asked."""
    z = tl.full([], 0, tl.int64)
    all_u = tl.zeros([BLOCK], tl.int64)
    all_n = tl.zeros([BLOCK], tl.int32)
    for block in range(tl.cdiv(row.v, BLOCK)):
        ids = block * BLOCK + tl.arange(0, BLOCK)
        s = load_scaled(row, ids)
        alive = survives(s, ids, row.m, bounds)
        here = tl.sum(tl.where(alive, masses(s - row.m), 0), 0)
        z += here
        if store:
            tl.store(sums + block, here)
        all_u += tl.where(alive, surprisals(s - row.m), 0)
        all_n += alive.to(tl.int32)
    return z, tl.sum(all_u, 0), tl.sum(all_n, 0)


@triton.jit
def _sums(row, bounds, found, inside, sums, store, sizes):
    """Sums the same over a list if that holds all survivors, and says whether it does."""
    z = tl.full([], 0, tl.int64)
    u = tl.full([], 0, tl.int64)
    n = tl.full([], 0, tl.int32)
    lost = inside == 0
    if inside:
        s, ids = tokens_of(found, sizes)
        alive = survives(s, ids, row.m, bounds)
        d = s - row.m
        z = tl.sum(tl.where(alive, masses(d), 0), 0)
        u = tl.sum(tl.where(alive, surprisals(d), 0), 0)
        n = tl.sum(alive.to(tl.int32), 0)
    if sizes.ALONE == 0:
        if lost:
            z, u, n = _sums_of_row(row, bounds, sums, store, sizes.BLOCK)
    return z, u, n, lost


@triton.jit
def _masses_at(s, ids, row, bounds, by_kappa, cut):
    """Sums the masses of survivors above a cut and at it."""
    alive, _, rank, _, _ = look(s, ids, row.m, bounds, by_kappa, by_kappa)
    mass = tl.where(alive, masses(s - row.m), 0)
    rank = tl.where(by_kappa, with_ties(rank), rank)
    return tl.where(rank > cut, mass, 0), tl.where(rank == cut, mass, 0)


@triton.jit
def _at_cut(row, bounds, by_kappa, cut, found, inside, partial, sizes):
    """Returns the mass above the last token that a cut keeps, and that of the token or its ties."""
    own, own_ids = tokens_of(found, sizes)
    above, at = _masses_at(own, own_ids, row, bounds, by_kappa, cut)
    before, last = tl.sum(above, 0), tl.sum(at, 0)
    before += tl.where(partial, found.held.above, 0)
    last = tl.where(partial & found.held.one, found.held.within, last)
    lost = (inside | partial) == 0
    if sizes.ALONE == 0:
        if lost:
            all_above = tl.zeros([sizes.BLOCK], tl.int64)
            all_at = tl.zeros([sizes.BLOCK], tl.int64)
            for block in range(tl.cdiv(row.v, sizes.BLOCK)):
                ids = block * sizes.BLOCK + tl.arange(0, sizes.BLOCK)
                s = load_scaled(row, ids)
                more_above, more_at = _masses_at(s, ids, row, bounds, by_kappa, cut)
                all_above += more_above
                all_at += more_at
            before, last = tl.sum(all_above, 0), tl.sum(all_at, 0)
    return before, last, lost


@triton.jit
def decide(rows, adaptors, parts, lists, weights, virtual, found, asked, sizes):
    """Runs the filters of a virtual row, each on the survivors of the one before.

    Where T is 0 no filter runs, and the bounds leave the lowest id of the largest logit.
    """
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
    partial = found.held.partial
    usable = (found.held.number <= sizes.LIST) & (partial == 0)
    inside = usable & (found.floor == float("-inf"))
    listed_from = exponentials(found.floor - m).to(tl.float64) * 1.0001  # masses above are listed

    cut, mass, guard, cutoff, cutoff_guard, band, centre = bounds_from(FINITE_RANK)
    j = tl.arange(0, sizes.BLOCKS)
    blocks = weights.blocks
    of_row = virtual.to(tl.int64) * blocks
    sums = weights.sums + of_row
    known = needs_masses(first) | asked.ALL_WEIGHED
    known_u = known & needs_surprisal(knobs)
    z = tl.sum(tl.load(sums + j, mask=j < tl.where(known, blocks, 0), other=0), 0)
    u = weights.surprisal_sums + of_row + j
    u = tl.sum(tl.load(u, mask=j < tl.where(known_u, blocks, 0), other=0), 0)
    typical_ran = first < 0  # false
    undecided = first < 0
    for i in range(6):
        knob = filter_at(knobs, i)
        value = load_knob(knobs, knob)
        if filters & (is_neutral(knob, value) == 0) & (undecided == 0):
            bounds = Bounds(cut, mass, guard, cutoff, cutoff_guard, band, centre)
            is_k, is_p, is_min = knob == TOP_K, knob == TOP_P, knob == MIN_P
            is_typical, is_eta = knob == TYPICAL_P, knob == ETA
            is_cutoff = (knob == EPSILON) | is_eta
            with_u = is_typical | is_eta
            if ((is_p | is_typical | is_cutoff) & (known == 0)) | (with_u & (known_u == 0)):
                z, u, _, lost = _sums(row, bounds, found, inside, sums, False, sizes)
                undecided |= lost & sizes.ALONE
            total = z.to(tl.float64)
            if is_typical:
                centre = (u.to(tl.float64) / total).to(tl.float32)
                bounds = Bounds(cut, mass, guard, cutoff, cutoff_guard, band, centre)
            part_of_z = value * total
            target = tl.minimum(value, MAX_KEEP).to(tl.int64)
            target = tl.where(is_k, tl.maximum(target, keep), mass_target(part_of_z))

            # the cut of the filter itself, and that of the tokens it must leave
            main = guard * 0 + NO_RANK
            least = main
            held = usable
            for turn in range(2):
                second = first * 0 + turn
                cuts = is_k | is_p | is_typical
                if second == 1:
                    cuts = ((keep > 1) & (is_k == 0)) | (is_cutoff & typical_ran)
                if cuts & (undecided == 0):
                    rank, in_list, lost = _cut(
                        row,
                        bounds,
                        is_typical,
                        (second == 0) & (is_k == 0),
                        tl.where(second == 0, target, keep),
                        found,
                        inside,
                        partial & (second == 0),
                        sizes,
                    )
                    held = held & in_list
                    undecided |= lost & sizes.ALONE
                    main = tl.where(second == 0, rank, main)
                    least = tl.where(second == 1, rank, least)

            main = tl.where(is_k | is_typical, with_ties(main), main)
            # the target was that of light tokens
            heavy = (z + 1023) >> 10
            own = masses(values((main >> 32).to(tl.int32)) - m)
            if (is_typical | (is_p & (own >= heavy))) & (undecided == 0):
                before, last, lost = _at_cut(
                    row, bounds, is_typical, main, found, inside | held, partial, sizes
                )
                undecided |= lost & sizes.ALONE
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
                p = cutoff_of(is_eta, value, z, u)
                cutoff = tl.maximum(cutoff, ceil64(p * total * NEARLY))
                best = with_ties(ranks(keys(m), 0))
                cutoff_guard = tl.where((keep > 1) | typical_ran, with_ties(least), best)
                held &= cutoff.to(tl.float64) > listed_from
            inside = inside | held
            typical_ran = typical_ran | is_typical
            known, known_u, partial = first < 0, first < 0, first < 0
    if greedy:
        best = _first_largest(row, found, sizes)
        undecided |= (best == LAST_ID) & sizes.ALONE
        cut = ranks(keys(m), best)
        inside = usable
    bounds = Bounds(cut, mass, guard, cutoff, cutoff_guard, band, centre)
    kept = tl.full([], 0, tl.int32)
    state = tl.where(undecided, UNDECIDED, DECIDED)
    if filters & (first == 0):
        kept = tl.sum(tl.load(weights.finite + of_row + j, mask=j < blocks, other=0), 0)
        inside = first < 0  # the masses of the blocks are there
    elif (filters | greedy) & (undecided == 0):
        if asked.SUM_LATER & (inside == 0):
            state = tl.full([], UNSUMMED, tl.int32)
        else:
            z, u, kept, lost = _sums(row, bounds, found, inside, sums, True, sizes)
            state = tl.where(lost & sizes.ALONE, UNDECIDED, state)
    return Decision(row, bounds, status, greedy, inside, state, kept, z)
