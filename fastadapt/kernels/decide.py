"""The filters of an adaptor on one row, by one program: from a row to the law that it leaves."""

import triton
import triton.language as tl

from fastadapt.kernels.arithmetic import (
    ANY_RANK,
    FINITE_RANK,
    LAST_ID,
    MIN_INT32,
    NO_RANK,
    ceil64,
    exp64,
    exponentials,
    keys,
    log_mass,
    masses,
    ranks,
    surprisals,
    with_ties,
)
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
    largest_of,
    load_knob,
    load_scaled,
    needs_masses,
    needs_surprisal,
    status_of,
    survives,
)
from fastadapt.kernels.scan import knobs_of
from fastadapt.kernels.select import cut_of_row, last_before, look


@triton.jit
def load_list(listed, listed_ids, number, LIST: tl.constexpr):
    """A row's list: scaled logits, -inf past its end, and ids."""
    at = tl.arange(0, LIST)
    there = at < number
    s = tl.load(listed + at, mask=there, other=float("-inf"))
    return s, tl.load(listed_ids + at, mask=there, other=0)


@triton.jit
def _cut(
    row,
    v,
    inverse,
    m,
    law,
    by_kappa,
    by_mass,
    target,
    usable,
    inside,
    floor,
    number,
    listed,
    listed_ids,
    spare,
    spare_ids,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
    BINS: tl.constexpr,
):
    """A cut, and whether the list held all that decides it."""
    cut = tl.full([], 0, tl.int64)
    if usable:
        s, ids = load_list(listed, listed_ids, number, LIST)
        alive, _, rank, q, weight = look(s, ids, m, law, by_kappa, by_mass)
        # as typical as the floor, below the centre, may also be tokens that are not in the list
        edge = floor - m + law[6]
        limit = tl.where(edge < 0.0, keys(edge), 2**31 - 1)
        near = keys(q) > tl.where(inside | (by_kappa == 0), MIN_INT32, limit)
        alive &= near
        weight = tl.where(near, weight, 0)
        usable = inside | (tl.sum(weight, 0) >= target)
        if usable:
            cut = last_before(rank, weight, alive, tl.full([], 0, tl.int64), target)
    if usable == 0:
        cut = cut_of_row(
            row,
            v,
            inverse,
            m,
            law,
            by_kappa,
            by_mass,
            target,
            spare,
            spare_ids,
            BLOCK,
            LIST,
            BINS,
        )
    return cut, usable


@triton.jit
def _sums(
    row, v, inverse, m, law, inside, number, listed, listed_ids, sums, store,
    BLOCK: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Mass, surprisal mass and number of the survivors; stores the masses of blocks if asked to."""
    if inside:
        s, ids = load_list(listed, listed_ids, number, LIST)
        alive = survives(s, ids, m, law)
        z = tl.sum(tl.where(alive, masses(s - m), 0), 0)
        u = tl.sum(tl.where(alive, surprisals(s - m), 0), 0)
        n = tl.sum(alive.to(tl.int32), 0)
    else:
        z = tl.full([], 0, tl.int64)
        all_u = tl.zeros([BLOCK], tl.int64)
        all_n = tl.zeros([BLOCK], tl.int32)
        for block in range(tl.cdiv(v, BLOCK)):
            ids = block * BLOCK + tl.arange(0, BLOCK)
            s = load_scaled(row, ids, v, inverse)
            alive = survives(s, ids, m, law)
            here = tl.sum(tl.where(alive, masses(s - m), 0), 0)
            z += here
            if store:
                tl.store(sums + block, here)
            all_u += tl.where(alive, surprisals(s - m), 0)
            all_n += alive.to(tl.int32)
        u, n = tl.sum(all_u, 0), tl.sum(all_n, 0)
    return z, u, n


@triton.jit
def decide(
    row,
    v,
    parts,
    splits,
    knobs,
    step,
    vllm,
    count,
    listed,
    listed_ids,
    floors,
    spare,
    spare_ids,
    sums,
    surprisal_sums,
    finite,
    blocks,
    ALL_WEIGHED: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
    BINS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Runs the filters of a row, each on the survivors of the one before.

    Returns the law, the largest scaled logit, 1 / T, the status, and of the survivors whether the
    list holds them all, their number and their mass. Where the list does not hold them, `sums` has
    the mass of each block. Where T is 0 nothing is filtered.
    """
    inverse = inverse_of(load_knob(knobs, TEMPERATURE, step))
    m = largest_of(parts, splits, SPLITS) * inverse + 0.0
    status = status_of(knobs, step, m)
    keep = tl.minimum(load_knob(knobs, KEEP, step), MAX_KEEP).to(tl.int64)
    filters = (status == OK) & (load_knob(knobs, TEMPERATURE, step) > 0)
    first = first_filter(knobs, step, vllm)
    number = tl.load(count)
    floor = tl.load(floors)
    usable = number <= LIST
    inside = usable & (floor == float("-inf"))

    cut = tl.full([], 0, tl.int64) + FINITE_RANK
    mass = tl.full([], 0, tl.int64)
    guard = mass + ANY_RANK
    cutoff = mass
    cutoff_guard = guard
    band = guard
    centre = tl.full([], 0.0, tl.float32)
    at = tl.arange(0, BLOCKS)
    known = needs_masses(first) | ALL_WEIGHED
    known_u = known & needs_surprisal(knobs, step)
    z = tl.sum(tl.load(sums + at, mask=at < tl.where(known, blocks, 0), other=0), 0)
    u = tl.sum(tl.load(surprisal_sums + at, mask=at < tl.where(known_u, blocks, 0), other=0), 0)
    typical_ran = first < 0  # false
    for i in range(6):
        knob = filter_at(i, vllm)
        value = load_knob(knobs, knob, step)
        if filters & (is_neutral(knob, value) == 0):
            law = (cut, mass, guard, cutoff, cutoff_guard, band, centre)
            is_k, is_p, is_min = knob == TOP_K, knob == TOP_P, knob == MIN_P
            is_typical, is_eta = knob == TYPICAL_P, knob == ETA
            is_cutoff = (knob == EPSILON) | is_eta
            with_u = is_typical | is_eta
            if ((is_p | is_typical | is_cutoff) & (known == 0)) | (with_u & (known_u == 0)):
                z, u, _ = _sums(
                    row, v, inverse, m, law, inside, number, listed, listed_ids, sums, False,
                    BLOCK, LIST,
                )  # fmt: skip
            total = z.to(tl.float64)
            if is_typical:
                centre = (u.to(tl.float64) / total).to(tl.float32)
                law = (cut, mass, guard, cutoff, cutoff_guard, band, centre)
            part_of_z = tl.where(is_p, 1.0 - value, value) * total
            target = tl.where(is_p, z - part_of_z.to(tl.int64), ceil64(part_of_z))
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
                        v,
                        inverse,
                        m,
                        law,
                        is_typical,
                        (second == 0) & (is_k == 0),
                        tl.where(second == 0, target, keep),
                        usable,
                        inside,
                        floor,
                        number,
                        listed,
                        listed_ids,
                        spare,
                        spare_ids,
                        BLOCK,
                        LIST,
                        BINS,
                    )
                    held = held & in_list
                    main = tl.where(second == 0, rank, main)
                    least = tl.where(second == 1, rank, least)

            main = tl.where(is_k | is_typical, with_ties(main), main)
            cut = tl.where(is_k | is_p, tl.maximum(cut, tl.minimum(main, least)), cut)
            band = tl.where(is_typical, tl.minimum(main, least), band)
            if is_min:
                mass = ceil64(value.to(tl.float32).to(tl.float64) * 1099511627776.0)
                guard = least
                held &= mass.to(tl.float64) > exponentials(floor - m).to(tl.float64) * 1.0001
            if is_cutoff:
                p = value
                if is_eta:
                    entropy = log_mass(z) + u.to(tl.float64) / total
                    p = tl.minimum(p, tl.sqrt(p) * exp64(-entropy))
                cutoff = tl.maximum(cutoff, ceil64(p * total))
                best = with_ties(ranks(keys(m), 0))
                cutoff_guard = tl.where((keep > 1) | typical_ran, with_ties(least), best)
                held &= cutoff.to(tl.float64) > exponentials(floor - m).to(tl.float64) * 1.0001
            inside = inside | held
            typical_ran = typical_ran | is_typical
            known, known_u = first < 0, first < 0
    law = (cut, mass, guard, cutoff, cutoff_guard, band, centre)
    kept = tl.full([], 0, tl.int32)
    if filters:
        if first == 0:
            kept = tl.sum(tl.load(finite + at, mask=at < blocks, other=0), 0)
            inside = first < 0  # the masses of the blocks are there
        else:
            z, u, kept = _sums(
                row, v, inverse, m, law, inside, number, listed, listed_ids, sums, True,
                BLOCK, LIST,
            )  # fmt: skip
    return law, m, inverse, status, inside, kept, z


@triton.jit
def decide_row(
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
    count,
    listed,
    listed_ids,
    floors,
    spare,
    spare_ids,
    sums,
    surprisal_sums,
    finite,
    blocks,
    ALL_WEIGHED: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
    BINS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """`decide` for the row that this program has."""
    virtual = tl.program_id(0)
    at, knobs = knobs_of(knobs, virtual, adaptors, knob_step, row_step)
    row = logits + at.to(tl.int64) * stride
    list_at, block_at = virtual.to(tl.int64) * LIST, virtual.to(tl.int64) * blocks
    return decide(
        row,
        v,
        parts + at * splits,
        splits,
        knobs,
        knob_step,
        vllm,
        count + virtual,
        listed + list_at,
        listed_ids + list_at,
        floors + virtual,
        spare + list_at,
        spare_ids + list_at,
        sums + block_at,
        surprisal_sums + block_at,
        finite + block_at,
        blocks,
        ALL_WEIGHED,
        BLOCK,
        LIST,
        BINS,
        SPLITS,
        BLOCKS,
    )


@triton.jit
def temperature_of(knobs, virtual, knob_step, row_step):
    """Temperature of a row under one adaptor."""
    return load_knob(knobs + virtual.to(tl.int64) * row_step, TEMPERATURE, knob_step)


@triton.jit
def first_largest(
    row, v, inverse, m, number, listed, listed_ids, BLOCK: tl.constexpr, LIST: tl.constexpr
):
    """The lowest id of the largest scaled logit."""
    best = tl.full([], LAST_ID, tl.int32)
    if number <= LIST:
        s, ids = load_list(listed, listed_ids, number, LIST)
        best = tl.min(tl.where(s == m, ids, LAST_ID), 0)
    block = tl.where(best == LAST_ID, 0, tl.cdiv(v, BLOCK))
    while block < tl.cdiv(v, BLOCK):
        ids = block * BLOCK + tl.arange(0, BLOCK)
        s = load_scaled(row, ids, v, inverse)
        best = tl.min(tl.where(s == m, ids, LAST_ID), 0)
        block = tl.where(best == LAST_ID, block + 1, tl.cdiv(v, BLOCK))
    return best
