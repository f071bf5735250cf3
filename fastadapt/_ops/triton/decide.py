"""The filters of an adaptor on one row, by one program: from a row to its bounds."""

import triton
import triton.language as tl

from fastadapt._ops.triton.arithmetic import (
    FINITE_RANK,
    LAST_ID,
    NEARLY,
    NO_RANK,
    ONE_KEY,
    bounds_from,
    ceil64,
    cutoff_of,
    exponentials,
    keys,
    mass_target,
    masses,
    min_p_mass,
    ranks,
    surprisals,
    survives,
    values,
    with_ties,
)
from fastadapt._ops.triton.bundles import Bounds, Decision, Progress, Row, Tokens, row_at
from fastadapt._ops.triton.rows import (
    ALL_WEIGHED,
    DECIDED,
    EPSILON,
    ETA,
    KEEP,
    MAX_KEEP,
    MIN_P,
    OK,
    SUM_LATER,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    TYPICAL_P,
    UNDECIDED,
    UNSUMMED,
    filter_at,
    first_filter,
    has,
    inverse_of,
    is_neutral,
    largest_of,
    length_of,
    load_knob,
    load_scaled,
    load_tokens,
    needs_masses,
    needs_surprisal,
    status_of,
    sums_of,
)
from fastadapt._ops.triton.select import copied, cut_of, is_held, look, tokens_of
from fastadapt._ops.triton.ties import cut_in_level, has_level, kept_of_level


@triton.jit
def _first_largest(row, found, sizes):
    """Returns the lowest id of the largest scaled logit, `LAST_ID` if the list cannot tell.

    Of a level it is that of the entry.
    """
    best = tl.full([], LAST_ID, tl.int32)
    if is_held(found.held, sizes):
        s, ids = tokens_of(found, found.held.tied, sizes)
        best = tl.min(tl.where(s == row.m, ids, LAST_ID), 0)
    if sizes.ALONE == 0:
        block = tl.where(best == LAST_ID, 0, tl.cdiv(row.v, sizes.BLOCK))
        while block < tl.cdiv(row.v, sizes.BLOCK):
            ids = block * sizes.BLOCK + tl.arange(0, sizes.BLOCK)
            best = tl.min(tl.where(load_scaled(row, ids) == row.m, ids, LAST_ID), 0)
            block = tl.where(best == LAST_ID, block + 1, tl.cdiv(row.v, sizes.BLOCK))
    return best


@triton.jit
def _sums_of(tokens, bounds, weights, WITH_U: tl.constexpr, sizes):
    """Sums mass, surprisal mass or else blocks, and number of survivors; of a list into its own."""
    row = tokens.row
    z = tl.full([], 0, tl.int64)
    all_u = tl.zeros([sizes.BLOCK], tl.int64)
    all_n = tl.zeros([sizes.BLOCK], tl.int32)
    listed = tokens.number >= 0
    if WITH_U == 0:
        j = tl.arange(0, sizes.BLOCKS)
        there = j < tl.where(listed, weights.blocks, 0)
        tl.store(weights.kept_sums + j, j.to(tl.int64) * 0, mask=there)
        tl.debug_barrier()
    for block in range(tl.cdiv(length_of(tokens), sizes.BLOCK)):
        s, ids = load_tokens(tokens, block, sizes.BLOCK)
        alive = survives(s, ids, row.m, bounds)
        mass = tl.where(alive, masses(s - row.m), 0)
        here = tl.sum(mass, 0)
        z += here
        all_n += alive.to(tl.int32)
        if WITH_U:
            all_u += tl.where(alive, surprisals(s - row.m), 0)
        elif listed:
            tl.atomic_add(weights.kept_sums + ids // sizes.BLOCK, mass, mask=alive, sem="relaxed")
        else:
            tl.store(weights.sums + block, here)
    return z, tl.sum(all_u, 0), tl.sum(all_n, 0)


@triton.jit
def _sums(row, bounds, found, inside, tied, weights, WITH_U: tl.constexpr, sizes):
    """Sums the same over a list if that holds all survivors, and says whether it does."""
    z = tl.full([], 0, tl.int64)
    u = tl.full([], 0, tl.int64)
    n = tl.full([], 0, tl.int32)
    held = inside & is_held(found.held, sizes)
    if held:
        s, ids = tokens_of(found, tied, sizes)
        alive = survives(s, ids, row.m, bounds)
        d = s - row.m
        z = tl.sum(copied(tl.where(alive, masses(d), 0), found, tied, sizes), 0)
        if WITH_U:
            u = tl.sum(copied(tl.where(alive, surprisals(d), 0), found, tied, sizes), 0)
        n = tl.sum(copied(alive.to(tl.int32), found, tied, sizes), 0)
    elif inside | (sizes.ALONE == 0):
        tokens = Tokens(row, found.listed, tl.where(inside, found.held.whole, -1))
        z, u, n = _sums_of(tokens, bounds, weights, WITH_U, sizes)
    return z, u, n, inside == 0


@triton.jit
def masses_at(s, ids, row, bounds, by_kappa, cut):
    """Sums the masses of survivors above a cut and at it."""
    alive, _, rank, _, _ = look(s, ids, row.m, bounds, by_kappa, by_kappa)
    mass = tl.where(alive, masses(s - row.m), 0)
    rank = tl.where(by_kappa, with_ties(rank), rank)
    return tl.where(rank > cut, mass, 0), tl.where(rank == cut, mass, 0)


@triton.jit
def _at_cut(row, bounds, by_kappa, cut, found, inside, tied, partial, sizes):
    """Returns the mass above the last token that a cut keeps, and that of the token or its ties."""
    own, own_ids = tokens_of(found, tied, sizes)
    above, at = masses_at(own, own_ids, row, bounds, by_kappa, cut)
    before = tl.sum(copied(above, found, tied, sizes), 0)
    last = tl.sum(copied(at, found, tied, sizes), 0)
    before += tl.where(partial, found.held.above, 0)
    last = tl.where(partial & found.held.one, found.held.within, last)
    lost = ((inside & is_held(found.held, sizes)) | partial) == 0
    if sizes.ALONE == 0:
        if lost:
            all_above = tl.zeros([sizes.BLOCK], tl.int64)
            all_at = tl.zeros([sizes.BLOCK], tl.int64)
            tokens = Tokens(row, found.listed, tl.where(inside, found.held.whole, -1))
            for block in range(tl.cdiv(length_of(tokens), sizes.BLOCK)):
                s, ids = load_tokens(tokens, block, sizes.BLOCK)
                more_above, more_at = masses_at(s, ids, row, bounds, by_kappa, cut)
                all_above += more_above
                all_at += more_at
            before, last = tl.sum(all_above, 0), tl.sum(all_at, 0)
    return before, last, lost


@triton.jit
def _filtered(knob, knobs, keep, row, found, weights, listed_from, state, sizes):
    """Runs one filter, if it is to act, on the survivors of those before."""
    cut, mass, guard, cutoff, cutoff_guard, band, centre = state.bounds
    z, u, known, known_u = state.z, state.u, state.known, state.known_u
    partial, inside, typical_ran = state.partial, state.inside, state.typical_ran
    tied, undecided, m, never = state.tied, state.undecided, row.m, state.never
    fits = found.held.whole >= 0
    value = load_knob(knobs, knob)
    if (is_neutral(knob, value) == 0) & (undecided == 0):
        bounds = Bounds(cut, mass, guard, cutoff, cutoff_guard, band, centre)
        is_k, is_p, is_min = knob == TOP_K, knob == TOP_P, knob == MIN_P
        is_typical, is_eta = knob == TYPICAL_P, knob == ETA
        is_cutoff = (knob == EPSILON) | is_eta
        with_u = is_typical | is_eta
        if ((is_p | is_typical | is_cutoff) & (known == 0)) | (with_u & (known_u == 0)):
            z, u, _, lost = _sums(row, bounds, found, inside, tied, weights, True, sizes)
            undecided = undecided | (lost & sizes.ALONE)
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
        held = fits
        for turn in range(2):
            second = keep.to(tl.int32) * 0 + turn
            cuts = is_k | is_p | is_typical
            if second == 1:
                cuts = ((keep > 1) & (is_k == 0)) | (is_cutoff & typical_ran)
            if cuts & (undecided == 0):
                rank, in_list, lost = cut_of(
                    row,
                    bounds,
                    is_typical,
                    (second == 0) & (is_k == 0),
                    tl.where(second == 0, target, keep),
                    found,
                    inside,
                    tied,
                    partial & (second == 0),
                    sizes,
                )
                held = held & in_list
                undecided = undecided | (lost & sizes.ALONE)
                main = tl.where(second == 0, rank, main)
                least = tl.where(second == 1, rank, least)

        main = tl.where(is_k | is_typical, with_ties(main), main)
        # the target was that of light tokens
        heavy = (z + 1023) >> 10
        own = masses(values((main >> 32).to(tl.int32)) - m)
        in_level = is_p & (undecided == 0) & has_level(found.held, sizes)
        in_level &= (main >> 32).to(tl.int32) == keys(found.floor)
        before, last = z * 0, z * 0
        if in_level:
            s, ids = tokens_of(found, tied * 0, sizes)
            above = tl.where(partial, found.held.above, 0)
            tied, before, last = kept_of_level(
                row, bounds, s, ids, found.floor, tied, target, above
            )
        if (is_typical | (is_p & (own >= heavy))) & (undecided == 0):
            if in_level == 0:
                before, last, lost = _at_cut(
                    row, bounds, is_typical, main, found, inside | held, tied, partial, sizes
                )
                undecided = undecided | (lost & sizes.ALONE)
            past = before >= tl.maximum(ceil64(part_of_z * NEARLY), 1)
            past &= last >= heavy
            tied -= (past & in_level).to(tl.int32)
            past &= in_level == 0
            main += tl.where(past, tl.where(is_typical, ONE_KEY, 1), 0)
        cut = tl.where(is_k | is_p, tl.maximum(cut, tl.minimum(main, least)), cut)
        band = tl.where(is_typical, tl.minimum(main, least), band)
        if is_min:
            mass = min_p_mass(value)
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
        known, known_u, partial = never, never, never
    bounds = Bounds(cut, mass, guard, cutoff, cutoff_guard, band, centre)
    return Progress(
        bounds, z, u, known, known_u, partial, inside, tied, typical_ran, undecided, never
    )


@triton.jit
def bounds_by_mass(knobs, weights, m, sizes):
    """Returns what min-p, epsilon or eta comes to in a row where no other filter acts."""
    first = first_filter(knobs)
    value = load_knob(knobs, first)
    cut, mass, guard, cutoff, cutoff_guard, band, centre = bounds_from(FINITE_RANK)
    if first == MIN_P:
        mass, guard = min_p_mass(value), guard * 0 + NO_RANK
    else:
        z, u = sums_of(weights, sizes.BLOCKS)
        p = cutoff_of(first == ETA, value, tl.maximum(z, 1), u)
        cutoff = ceil64(p * z.to(tl.float64) * NEARLY)
        cutoff_guard = with_ties(ranks(keys(m), 0))
    return Bounds(cut, mass, guard, cutoff, cutoff_guard, band, centre)


@triton.jit
def decide(rows, knobs, asked, parts, weights, at, found, sizes):
    """Runs the filters of a virtual row, each on the survivors of the one before.

    Where T is 0 no filter runs, and the bounds leave the lowest id of the largest logit.
    """
    temperature = load_knob(knobs, TEMPERATURE)
    inverse = inverse_of(temperature)
    m = largest_of(parts, sizes.SPLITS) * inverse + 0.0
    row = Row(row_at(rows, at), rows.v, inverse, m)
    status = status_of(knobs, m)
    greedy = (status == OK) & (temperature == 0)
    filters = (status == OK) & (temperature > 0)
    keep = tl.minimum(load_knob(knobs, KEEP), MAX_KEEP).to(tl.int64)
    first = first_filter(knobs)
    partial = found.held.partial
    fits = found.held.whole >= 0
    inside = fits & (found.floor == float("-inf"))
    listed_from = exponentials(found.floor - m).to(tl.float64) * 1.0001  # masses above are listed

    j = tl.arange(0, sizes.BLOCKS)
    blocks = weights.blocks
    known = needs_masses(first) | has(asked, ALL_WEIGHED)
    known_u = known & (sizes.PLAIN == 0)
    if sizes.PLAIN == 0:
        known_u = known & needs_surprisal(knobs)
    z = tl.sum(tl.load(weights.sums + j, mask=j < tl.where(known, blocks, 0), other=0), 0)
    u = weights.surprisal_sums + j
    u = tl.sum(tl.load(u, mask=j < tl.where(known_u, blocks, 0), other=0), 0)
    never = first < 0
    bounds = bounds_from(FINITE_RANK)
    tied = found.held.tied
    state = Progress(bounds, z, u, known, known_u, partial, inside, tied, never, never, never)
    if filters:
        if sizes.PLAIN:  # what other filters need is left out of the kernel
            for knob in tl.static_range(TOP_K, TOP_P + 1):
                state = _filtered(knob, knobs, keep, row, found, weights, listed_from, state, sizes)
        else:
            for i in range(6):
                knob = filter_at(knobs, i)
                state = _filtered(knob, knobs, keep, row, found, weights, listed_from, state, sizes)
    cut, mass, guard, cutoff, cutoff_guard, band, centre = state.bounds
    z, inside, tied, undecided = state.z, state.inside, state.tied, state.undecided
    if greedy:
        best = _first_largest(row, found, sizes)
        undecided = undecided | ((best == LAST_ID) & sizes.ALONE)
        cut = ranks(keys(m), best)
        inside = fits
        tied = tl.minimum(tied, 1)
    # the cut of some of a level is that of its entry so far
    of_level = has_level(found.held, sizes) & (undecided == 0)
    if of_level & (cut == ranks(keys(found.floor), 0)):
        cut = cut_in_level(row, weights, found.floor, tied, sizes)
    bounds = Bounds(cut, mass, guard, cutoff, cutoff_guard, band, centre)
    kept = tl.full([], 0, tl.int32)
    left = tl.where(undecided, UNDECIDED, DECIDED)
    if filters & (first == 0):
        kept = tl.sum(tl.load(weights.finite + j, mask=j < blocks, other=0), 0)
        inside = first < 0  # the masses of the blocks are there
    elif (filters | greedy) & (undecided == 0):
        if has(asked, SUM_LATER) & (inside == 0):
            left = tl.full([], UNSUMMED, tl.int32)
        else:
            z, u, kept, lost = _sums(row, bounds, found, inside, tied, weights, False, sizes)
            left = tl.where(lost & sizes.ALONE, UNDECIDED, left)
    return Decision(row, bounds, status, greedy, inside, tied, left, kept, z)
