"""The draw: a row is decided, and a token of its survivors is found by its running mass."""

import triton
import triton.language as tl

from fastadapt.kernels.arithmetic import LAST_ID, draw_target, log_mass, masses
from fastadapt.kernels.decide import decide, found_of
from fastadapt.kernels.rows import OK, largest_of, load_list, load_scaled, survives
from fastadapt.kernels.select import last_before


@triton.jit
def _first_in_block(row, law, block, before, target, BLOCK: tl.constexpr):
    """The same of a block, with the mass before it."""
    ids = block * BLOCK + tl.arange(0, BLOCK)
    s = load_scaled(row, ids)
    mass = tl.where(survives(s, ids, row.m, law), masses(s - row.m), 0)
    return tl.min(tl.where(before + tl.cumsum(mass, 0) > target, ids, LAST_ID), 0)


@triton.jit
def _first_beyond(decided, found, sums, blocks, target, sizes):
    """The first survivor, by id, whose running mass exceeds a target."""
    row, law = decided.row, decided.law
    if decided.inside:
        s, ids = load_list(found.listed, found.number, sizes.LIST)
        alive = survives(s, ids, row.m, law)
        weight = tl.where(alive, masses(s - row.m), 0)
        by_id = tl.where(alive, -ids, 1).to(tl.int64)
        best = last_before(by_id, weight, alive, tl.full([], 0, tl.int64), target + 1)
        token = (-best).to(tl.int32)
    else:
        tl.debug_barrier()  # masses of blocks that other threads stored
        at = tl.arange(0, sizes.BLOCKS)
        mass = tl.load(sums + at, mask=at < blocks, other=0)
        running = tl.cumsum(mass, 0)
        block = tl.sum(((running <= target) & (at < blocks)).to(tl.int32), 0)
        before = tl.sum(tl.where(at < block, mass, 0), 0)
        token = _first_in_block(row, law, block, before, target, sizes.BLOCK)
    return token


@triton.jit
def sample_kernel(
    rows, adaptors, parts, lists, weights, chance, out,
    POSITIONS: tl.constexpr, BASE: tl.constexpr, LOG_MASS: tl.constexpr,
    ALL_WEIGHED: tl.constexpr, sizes,
):  # fmt: skip
    """Decides a row and draws from it."""
    at = tl.program_id(0)
    j = tl.arange(0, sizes.BLOCKS)
    here = weights.sums + at.to(tl.int64) * weights.blocks
    all_mass = tl.full([], 0, tl.int64)
    if LOG_MASS:  # before the blocks become those of the survivors
        all_mass = tl.sum(tl.load(here + j, mask=j < weights.blocks, other=0), 0)
    decided = decide(rows, adaptors, parts, lists, weights, ALL_WEIGHED, sizes)
    row, status = decided.row, decided.status
    token = tl.full([], -1, tl.int32)
    nan = row.m * 0.0 + float("nan")
    logprob, base, log_kept = nan, nan, nan
    if status == OK:
        position = tl.full([], 0, tl.int64)
        if POSITIONS:
            position = tl.load(chance.positions + at)
        target = draw_target(tl.load(chance.seeds + at), position, decided.total)
        found = found_of(lists, at, sizes.LIST)
        token = _first_beyond(decided, found, here, weights.blocks, target, sizes)
        x = tl.load(row.logits + token, mask=token < row.v, other=float("nan")).to(tl.float32)
        of_kept = log_mass(decided.total)
        logprob = x * row.inverse
        logprob = (logprob.to(tl.float64) - row.m.to(tl.float64) - of_kept).to(tl.float32)
        if LOG_MASS:
            log_kept = (of_kept - log_mass(all_mass)).to(tl.float32)
            log_kept = tl.where(decided.greedy, 0.0, log_kept)
        if BASE:
            m1 = largest_of(parts, at, sizes.SPLITS)
            masses1 = weights.base_sums + at.to(tl.int64) * weights.blocks + j
            of_all = log_mass(tl.sum(tl.load(masses1, mask=j < weights.blocks, other=0), 0))
            base = (x.to(tl.float64) - m1.to(tl.float64) - of_all).to(tl.float32)
    tl.store(out.tokens + at, token.to(tl.int64))
    tl.store(out.logprobs + at, logprob)
    tl.store(out.kept + at, tl.where(status == OK, decided.kept, 0))
    tl.store(out.status + at, status.to(tl.uint8))
    if BASE:
        tl.store(out.base_logprobs + at, base)
    if LOG_MASS:
        tl.store(out.log_masses + at, log_kept)
