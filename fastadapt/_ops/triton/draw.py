"""The draw: decides a row, then finds the token by the running mass of its survivors.

First every row is tried by its list alone, then the rows for which that does not do; of rows whose
survivors no list holds, the masses are summed by many programs, the last of which draws. Where a
mass alone says who survives, as under min-p, epsilon or eta and no other filter, that is all.
The most probable tokens beside it are of the base distribution, as is the rank of the drawn one.
"""

import triton
import triton.language as tl

from fastadapt._ops.triton.arithmetic import (
    ANY_RANK,
    LAST_ID,
    bounds_from,
    draw_target,
    floor_of,
    keys,
    log_mass,
    masses,
    only_cut,
    ranks,
    survives,
)
from fastadapt._ops.triton.bundles import Chance, Outcome, Row, Tokens, row_at
from fastadapt._ops.triton.decide import bounds_by_mass, decide
from fastadapt._ops.triton.rows import (
    BASE_LOGPROBS,
    BOUNDS_STATUS,
    BY_MASS,
    DECIDED,
    LOG_MASS,
    MARK_STATE,
    MARK_SUMMED,
    OK,
    POSITIONS,
    TEMPERATURE,
    UNDECIDED,
    UNSUMMED,
    follow,
    has,
    hits_of,
    inverse_of,
    knobs_of,
    largest_of,
    lists_of,
    load_bounds,
    load_knob,
    load_scaled,
    marks_of,
    parts_of,
    status_of,
    store_bounds,
    weights_of,
)
from fastadapt._ops.triton.select import cut_among, found_of, held_of, is_held, tokens_of
from fastadapt._ops.triton.ties import add_list, store_level

NOTHING = tl.constexpr(2**63 - 1)
ID_SHIFT = tl.constexpr(41)  # over a mass; ids have 22 bits
MASS_BITS = tl.constexpr((1 << 41) - 1)


@triton.jit
def _first_in_list(row, bounds, found, target, sizes):
    """Finds the first survivor of a list, by id, whose running mass exceeds a target."""
    s, own_ids = tokens_of(found, found.held.tied, sizes)
    alive = survives(s, own_ids, row.m, bounds)
    mass = tl.where(alive, masses(s - row.m), 0)
    if sizes.ALONE:
        packed = tl.where(alive, (own_ids.to(tl.int64) << ID_SHIFT) + mass, NOTHING)
        packed = tl.sort(packed)
        there = packed != NOTHING
        running = tl.cumsum(tl.where(there, packed & MASS_BITS, 0), 0)
        ids = (packed >> ID_SHIFT).to(tl.int32)
        token = tl.min(tl.where(there & (running > target), ids, LAST_ID), 0)
    else:  # of a long list halving ids takes a third of the time
        token = tl.full([], 0, tl.int32)
        last = token + row.v - 1
        while token < last:
            middle = (token + last) // 2
            beyond = tl.sum(tl.where(own_ids <= middle, mass, 0), 0) > target
            last = tl.where(beyond, middle, last)
            token = tl.where(beyond, token, middle + 1)
    return token


@triton.jit
def first_by_blocks(row, bounds, sums, blocks, target, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Finds that survivor by the masses of blocks, then within one block."""
    at = tl.arange(0, BLOCKS)
    # some were summed by atomic additions, of which a first-level cache may not know
    mass = tl.load(sums + at, mask=at < blocks, other=0, cache_modifier=".cg")
    running = tl.cumsum(mass, 0)
    block = tl.sum(((running <= target) & (at < blocks)).to(tl.int32), 0)
    before = tl.sum(tl.where(at < block, mass, 0), 0)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    s = load_scaled(row, ids)
    mass = tl.where(survives(s, ids, row.m, bounds), masses(s - row.m), 0)
    return tl.min(tl.where(before + tl.cumsum(mass, 0) > target, ids, LAST_ID), 0)


@triton.jit
def target_of(chance, at, total, asked):
    """Returns the value that the running mass must exceed."""
    position = tl.load(chance.positions + at, mask=has(asked, POSITIONS), other=0)
    return draw_target(tl.load(chance.seeds + at), position, total)


@triton.jit
def store_drawn(parts, weights, out, at, row, outcome, asked, sizes):
    """Stores all fields of a row with a known token; a bad row has none."""
    nan = row.m * 0.0 + float("nan")
    logprob, base, log_kept = nan, nan, nan
    token = outcome.token
    if outcome.status == OK:
        x = tl.load(row.logits + token, mask=token < row.v, other=float("nan")).to(tl.float32)
        of_kept = log_mass(outcome.total)
        logprob = x * row.inverse
        logprob = (logprob.to(tl.float64) - row.m.to(tl.float64) - of_kept).to(tl.float32)
        if has(asked, LOG_MASS):
            log_kept = (of_kept - log_mass(outcome.all_mass)).to(tl.float32)
            log_kept = tl.where(outcome.greedy, 0.0, log_kept)
        if has(asked, BASE_LOGPROBS):
            m1 = largest_of(parts, sizes.SPLITS)
            j = tl.arange(0, sizes.BLOCKS)
            masses1 = tl.load(weights.base_sums + j, mask=j < weights.blocks, other=0)
            of_all = log_mass(tl.sum(masses1, 0))
            base = (x.to(tl.float64) - m1.to(tl.float64) - of_all).to(tl.float32)
    tl.store(out.tokens + at, token.to(tl.int64))
    tl.store(out.logprobs + at, logprob)
    tl.store(out.kept + at, tl.where(outcome.status == OK, outcome.kept, 0))
    tl.store(out.status + at, outcome.status.to(tl.uint8))
    if has(asked, BASE_LOGPROBS):
        tl.store(out.base_logprobs + at, base)
    if has(asked, LOG_MASS):
        tl.store(out.log_masses + at, log_kept)


@triton.jit
def _try_row(rows, packed, asked, scratch, sizes, chance, out, at, held):
    """Decides a row and draws from it if its list allows; returns the row's state."""
    _, knobs = knobs_of(packed, asked, at)
    parts = parts_of(scratch, asked, at, rows.v, sizes)
    weights = weights_of(scratch, asked, at, at, rows.v, sizes)
    j = tl.arange(0, sizes.BLOCKS)
    here = weights.sums
    # before the blocks become those of the survivors
    there = j < tl.where(has(asked, LOG_MASS), weights.blocks, 0)
    all_mass = tl.sum(tl.load(here + j, mask=there, other=0), 0)
    found = found_of(scratch, at, held, sizes)
    decided = decide(rows, knobs, asked, parts, weights, at, found, sizes)
    row, status, state = decided.row, decided.status, decided.state
    total, kept = decided.total, decided.kept
    kept_sums = weights.kept_sums
    if (state == UNSUMMED) & held.counted:  # but for the kept of the bracket
        here = kept_sums
        if held.tied > 0:
            kept = store_level(
                row, decided.bounds, weights, found.floor, decided.tied, held.counted, sizes
            )
        else:
            s, ids = tokens_of(found, held.tied, sizes)
            alive = add_list(row, decided.bounds, s, ids, here, sizes)
            kept = tl.sum(alive.to(tl.int32), 0)
        kept += tl.sum(tl.load(weights.finite + j, mask=j < weights.blocks, other=0), 0)
        tl.debug_barrier()
        total = tl.load(here + j, mask=j < weights.blocks, other=0, cache_modifier=".cg")
        total = tl.sum(total, 0)
        state = tl.full([], 0, tl.int32) + DECIDED
    token = tl.full([], -1, tl.int32)
    if (status == OK) & (state == DECIDED):
        target = target_of(chance, at, total, asked)
        listed = decided.inside & is_held(held, sizes)
        if listed & (held.tied > 0):
            store_level(
                row, decided.bounds, weights, found.floor, decided.tied, held.counted, sizes
            )
            tl.debug_barrier()
            s, ids = tokens_of(found, held.tied * 0, sizes)
            add_list(row, decided.bounds, s, ids, kept_sums, sizes)
        if listed & (held.tied == 0):
            token = _first_in_list(row, decided.bounds, found, target, sizes)
        else:
            here = tl.where(decided.inside, kept_sums, here)  # of the list
            tl.debug_barrier()  # masses of blocks that other threads stored
            token = first_by_blocks(
                row, decided.bounds, here, weights.blocks, target, sizes.BLOCK, sizes.BLOCKS
            )
    if state == DECIDED:
        outcome = Outcome(status, decided.greedy, kept, total, all_mass, token)
        store_drawn(parts, weights, out, at, row, outcome, asked, sizes)
    if state == UNSUMMED:
        marks = marks_of(scratch, at)
        store_bounds(marks + scratch.BOUNDS, decided.bounds, status)
    return state


@triton.jit(do_not_specialize=["packed", "asked", "seeds", "positions"])
def short_kernel(rows, packed, asked, scratch, sizes, seeds, positions, out, PDL: tl.constexpr):
    """Decides the rows whose lists are short, and draws from them."""
    follow(PDL)
    at = tl.program_id(0)
    _, knobs = knobs_of(packed, asked, at)
    held = held_of(scratch, at, knobs, sizes)
    state = tl.full([], 0, tl.int32) + UNDECIDED
    if held.number <= sizes.LIST:
        chance = Chance(seeds, positions)
        state = _try_row(rows, packed, asked, scratch, sizes, chance, out, at, held)
    tl.store(marks_of(scratch, at) + MARK_STATE, state.to(tl.int64))


@triton.jit(do_not_specialize=["packed", "asked", "seeds", "positions"])
def long_kernel(rows, packed, asked, scratch, sizes, seeds, positions, out, PDL: tl.constexpr):
    """Decides the remaining rows, by longer lists or, where none is enough, the whole row."""
    follow(PDL)
    at = tl.program_id(0)
    marks = marks_of(scratch, at)
    if tl.load(marks + MARK_STATE) == UNDECIDED:
        _, knobs = knobs_of(packed, asked, at)
        held = held_of(scratch, at, knobs, sizes)
        chance = Chance(seeds, positions)
        state = _try_row(rows, packed, asked, scratch, sizes, chance, out, at, held)
        tl.store(marks + MARK_STATE, state.to(tl.int64))


@triton.jit
def _alive_by_mass(s, mass, m, bounds):
    """Whether tokens survive under bounds of `bounds_by_mass`, at a fifth of `survives`' price."""
    least = tl.maximum(bounds.mass, bounds.cutoff)
    # epsilon and eta keep the most probable
    of_best = tl.where(bounds.cutoff_guard > ANY_RANK, bounds.mass, least)
    return (s > float("-inf")) & (mass >= tl.where(s >= m, of_best, least))


@triton.jit
def _kept_of_columns(row, tile, hit, bounds, sizes, AT_ONCE: tl.constexpr):
    """Sums and counts the survivors of some groups of a tile by block, so many groups at a time."""
    COLUMNS: tl.constexpr = sizes.COLUMNS
    BLOCKS: tl.constexpr = COLUMNS * sizes.GROUP // sizes.BLOCK
    c = tl.arange(0, COLUMNS)
    turn = tl.cumsum(hit.to(tl.int32), 0) - 1
    left = tl.sum(hit.to(tl.int32), 0)
    total, number = tl.zeros([BLOCKS], tl.int64), tl.zeros([BLOCKS], tl.int32)
    for done in range(0, left, AT_ONCE):
        wanted = done + tl.arange(0, AT_ONCE)
        here = hit[None, :] & (turn[None, :] == wanted[:, None])
        column = tl.sum(tl.where(here, c[None, :], 0), 1)
        r = tl.arange(0, sizes.GROUP)[:, None]
        ids = tile * (COLUMNS * sizes.GROUP) + column[None, :] + r * COLUMNS
        s = load_scaled(row, ids)
        alive = survives(s, ids, row.m, bounds) & (wanted < left)[None, :]
        mass = tl.where(alive, masses(s - row.m), 0)
        by_block: tl.constexpr = (BLOCKS, sizes.GROUP // BLOCKS * AT_ONCE)
        total += tl.sum(tl.reshape(mass, by_block), 1)
        number += tl.sum(tl.reshape(alive.to(tl.int32), by_block), 1)
    return total, number


@triton.jit
def _sum_tile(row, parts, weights, tile, bounds, floor, by_mass, sizes, AT_ONCE: tl.constexpr):
    """Sums and counts the survivors of a tile by block; only of groups that reach their floor."""
    BLOCKS: tl.constexpr = sizes.COLUMNS * sizes.GROUP // sizes.BLOCK
    hit = hits_of(parts, tile, row.inverse, floor, sizes.COLUMNS)
    if tl.sum(hit.to(tl.int32), 0) <= AT_ONCE:
        total, number = _kept_of_columns(row, tile, hit, bounds, sizes, AT_ONCE)
        own = tile * BLOCKS + tl.arange(0, BLOCKS)
        tl.store(weights.kept_sums + own, total, mask=own < weights.blocks)
        tl.store(weights.finite + own, number, mask=own < weights.blocks)
    else:
        simple = only_cut(bounds)
        for block in range(tile * BLOCKS, tl.minimum((tile + 1) * BLOCKS, weights.blocks)):
            ids = block * sizes.BLOCK + tl.arange(0, sizes.BLOCK)
            s = load_scaled(row, ids)
            mass = masses(s - row.m)
            if by_mass:
                alive = _alive_by_mass(s, mass, row.m, bounds)
            elif simple:
                alive = ranks(keys(s), ids) >= bounds.cut
            else:
                alive = survives(s, ids, row.m, bounds)
            tl.store(weights.kept_sums + block, tl.sum(tl.where(alive, mass, 0), 0))
            tl.store(weights.finite + block, tl.sum(alive.to(tl.int32), 0))


@triton.jit(do_not_specialize=["packed", "asked", "seeds", "positions"])
def sum_kernel(
    rows, packed, asked, scratch, sizes, seeds, positions, out,
    AT_ONCE: tl.constexpr,  # groups of a tile that are read together
    PDL: tl.constexpr,
):  # fmt: skip
    """Sums the survivors of a decided row by block; the last program of a row draws.

    Where one filter by mass is all there is, each program decides the row for itself.
    """
    follow(PDL)
    at, part = tl.program_id(0), tl.program_id(1)
    marks = marks_of(scratch, at)
    by_mass = has(asked, BY_MASS)
    state = tl.load(marks + MARK_STATE)
    if by_mass | (state == UNSUMMED):
        _, knobs = knobs_of(packed, asked, at)
        temperature = load_knob(knobs, TEMPERATURE)
        inverse = inverse_of(temperature)
        parts = parts_of(scratch, asked, at, rows.v, sizes)
        weights = weights_of(scratch, asked, at, at, rows.v, sizes)
        m = largest_of(parts, sizes.SPLITS) * inverse + 0.0
        row = Row(row_at(rows, at), rows.v, inverse, m)
        if by_mass:
            bounds = bounds_by_mass(knobs, weights, m, sizes)
            status = status_of(knobs, m)
        else:
            bounds = load_bounds(marks + scratch.BOUNDS)
            status = tl.load(marks + scratch.BOUNDS + BOUNDS_STATUS).to(tl.int32)
        floor = floor_of(bounds, m)
        for tile in range(part, parts.splits, tl.num_programs(1)):
            _sum_tile(row, parts, weights, tile, bounds, floor, by_mass, sizes, AT_ONCE)
        tl.debug_barrier()
        if tl.atomic_add(marks + MARK_SUMMED, 1, sem="acq_rel") == tl.num_programs(1) - 1:
            j = tl.arange(0, sizes.BLOCKS)
            here = j < weights.blocks
            total = tl.sum(tl.load(weights.kept_sums + j, mask=here, other=0), 0)
            kept = tl.sum(tl.load(weights.finite + j, mask=here, other=0), 0)
            there = j < tl.where(has(asked, LOG_MASS), weights.blocks, 0)
            all_mass = tl.sum(tl.load(weights.sums + j, mask=there, other=0), 0)
            token = tl.full([], -1, tl.int32)
            if status == OK:
                target = target_of(Chance(seeds, positions), at, total, asked)
                token = first_by_blocks(
                    row, bounds, weights.kept_sums, weights.blocks, target,
                    sizes.BLOCK, sizes.BLOCKS,
                )  # fmt: skip
            outcome = Outcome(status, temperature == 0, kept, total, all_mass, token)
            store_drawn(parts, weights, out, at, row, outcome, asked, sizes)


@triton.jit(do_not_specialize=["asked", "number"])
def top_kernel(rows, asked, scratch, sizes, number, drawn, token_ranks, PDL: tl.constexpr):
    """A cut by count, and a pass that collects what is above it in the spare list, in no order."""
    follow(PDL)
    at = tl.program_id(0)
    spare = lists_of(scratch, at, sizes)[1]
    token = tl.load(drawn.tokens + at)
    above = tl.zeros([sizes.BLOCK], tl.int32)
    if tl.load(drawn.status + at) == OK:
        one = tl.full([], 1.0, tl.float32)
        parts = parts_of(scratch, asked, at, rows.v, sizes)
        row = Row(row_at(rows, at), rows.v, one, largest_of(parts, sizes.SPLITS))
        no = token < 0
        wanted = tl.full([], 0, tl.int64) + number
        tokens = Tokens(row, spare, tl.full([], -1, tl.int32))
        cut = cut_among(
            tokens, bounds_from(ANY_RANK), no, no, wanted, spare,
            sizes.BLOCK, sizes.LIST, sizes.BINS,
        )  # fmt: skip
        own = ranks(keys(tl.load(row.logits + token).to(tl.float32)), token.to(tl.int32))
        tl.debug_barrier()  # the spare list may still be read
        filled = tl.full([], 0, tl.int32)
        for block in range(tl.cdiv(rows.v, sizes.BLOCK)):
            ids = block * sizes.BLOCK + tl.arange(0, sizes.BLOCK)
            rank = ranks(keys(load_scaled(row, ids)), ids)
            above += ((rank >= own) & (ids < rows.v)).to(tl.int32)
            hit = (rank >= cut) & (ids < rows.v)
            place = filled + tl.cumsum(hit.to(tl.int32), 0)
            filled = tl.max(place, 0)
            tl.store(spare.ids + place - 1, ids, mask=hit & (place <= number))
    tl.store(token_ranks + at, tl.sum(above, 0))


@triton.jit(do_not_specialize=["asked", "number"])
def sort_kernel(
    rows, asked, scratch, sizes, number, drawn,
    top_ids,  # (rows, number)
    top_logprobs, TOP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Puts them in the order of their ranks, and scores them."""
    follow(PDL)
    at = tl.program_id(0)
    row = row_at(rows, at)
    place = tl.arange(0, TOP)
    there = place < number
    out = at.to(tl.int64) * number + place
    if tl.load(drawn.status + at) == OK:
        m = largest_of(parts_of(scratch, asked, at, rows.v, sizes), sizes.SPLITS)
        weights = weights_of(scratch, asked, at, at, rows.v, sizes)
        spare = lists_of(scratch, at, sizes)[1]
        collected = tl.load(spare.ids + place, mask=there, other=0)
        x = tl.load(row + collected, mask=there, other=float("-inf")).to(tl.float32)
        rank = tl.sort(tl.where(there, ranks(keys(x), collected), ANY_RANK), descending=True)
        ids = LAST_ID - (rank & 0xFFFFFFFF)
        x = tl.load(row + ids, mask=there, other=float("-inf")).to(tl.float32)
        j = tl.arange(0, sizes.BLOCKS)
        base = weights.base_sums + j
        log_z = log_mass(tl.sum(tl.load(base, mask=j < weights.blocks, other=0), 0))
        value = (x.to(tl.float64) - m.to(tl.float64) - log_z).to(tl.float32)
        tl.store(top_ids + out, ids, mask=there)
        tl.store(top_logprobs + out, value, mask=there)
    else:
        tl.store(top_ids + out, place.to(tl.int64) * 0 - 1, mask=there)
        tl.store(top_logprobs + out, place.to(tl.float32) * 0 + float("nan"), mask=there)
