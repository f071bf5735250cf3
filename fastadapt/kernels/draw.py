"""The draw: a row is decided, and a token of its survivors is found by its running mass."""

import triton
import triton.language as tl

from fastadapt.kernels.arithmetic import LAST_ID, draw_target, log_mass, masses
from fastadapt.kernels.decide import decide_row, first_largest, load_list, temperature_of
from fastadapt.kernels.rows import OK, largest_of, load_scaled, survives
from fastadapt.kernels.select import last_before


@triton.jit
def _first_in_block(row, v, inverse, m, law, block, before, target, BLOCK: tl.constexpr):
    """The same of a block, with the mass before it."""
    ids = block * BLOCK + tl.arange(0, BLOCK)
    s = load_scaled(row, ids, v, inverse)
    mass = tl.where(survives(s, ids, m, law), masses(s - m), 0)
    return tl.min(tl.where(before + tl.cumsum(mass, 0) > target, ids, LAST_ID), 0)


@triton.jit
def _first_beyond(
    row, v, inverse, m, law, inside, number, listed, listed_ids, sums, blocks, target,
    BLOCK: tl.constexpr, LIST: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The first survivor, by id, whose running mass exceeds a target."""
    if inside:
        s, ids = load_list(listed, listed_ids, number, LIST)
        alive = survives(s, ids, m, law)
        weight = tl.where(alive, masses(s - m), 0)
        by_id = tl.where(alive, -ids, 1).to(tl.int64)
        best = last_before(by_id, weight, alive, tl.full([], 0, tl.int64), target + 1)
        token = (-best).to(tl.int32)
    else:
        tl.debug_barrier()  # masses of blocks that other threads stored
        at = tl.arange(0, BLOCKS)
        mass = tl.load(sums + at, mask=at < blocks, other=0)
        running = tl.cumsum(mass, 0)
        block = tl.sum(((running <= target) & (at < blocks)).to(tl.int32), 0)
        before = tl.sum(tl.where(at < block, mass, 0), 0)
        token = _first_in_block(row, v, inverse, m, law, block, before, target, BLOCK)
    return token


@triton.jit
def sample_kernel(
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
    base_sums,
    seeds,
    positions,
    tokens,
    logprobs,
    kept_out,
    status_out,
    base_logprobs,
    log_masses,
    POSITIONS: tl.constexpr,
    BASE: tl.constexpr,
    LOG_MASS: tl.constexpr,
    ALL_WEIGHED: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
    BINS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Decides a row and draws from it."""
    at = tl.program_id(0)
    j = tl.arange(0, BLOCKS)
    here = sums + at.to(tl.int64) * blocks
    all_mass = tl.full([], 0, tl.int64)
    if LOG_MASS:  # before the blocks become those of the survivors
        all_mass = tl.sum(tl.load(here + j, mask=j < blocks, other=0), 0)
    law, m, inverse, status, inside, kept, total = decide_row(
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
        ALL_WEIGHED,
        BLOCK,
        LIST,
        BINS,
        SPLITS,
        BLOCKS,
    )
    row = logits + at.to(tl.int64) * stride
    list_at = at.to(tl.int64) * LIST
    token = tl.full([], -1, tl.int32)
    nan = m * 0.0 + float("nan")
    logprob, base, log_kept = nan, nan, nan
    if status == OK:
        number = tl.load(count + at)
        if temperature_of(knobs, at, knob_step, row_step) == 0:
            kept = tl.full([], 1, tl.int32)
            token = first_largest(
                row, v, inverse, m, number, listed + list_at, listed_ids + list_at, BLOCK, LIST
            )
            logprob, log_kept = m * 0.0, m * 0.0
        else:
            position = tl.full([], 0, tl.int64)
            if POSITIONS:
                position = tl.load(positions + at)
            target = draw_target(tl.load(seeds + at), position, total)
            token = _first_beyond(
                row, v, inverse, m, law, inside, number, listed + list_at, listed_ids + list_at,
                here, blocks, target, BLOCK, LIST, BLOCKS,
            )  # fmt: skip
            s = tl.load(row + token, mask=token < v, other=float("nan")).to(tl.float32) * inverse
            of_kept = log_mass(total)
            logprob = (s.to(tl.float64) - m.to(tl.float64) - of_kept).to(tl.float32)
            if LOG_MASS:
                log_kept = (of_kept - log_mass(all_mass)).to(tl.float32)
        if BASE:
            x = tl.load(row + token, mask=token < v, other=float("nan")).to(tl.float32)
            m1 = largest_of(parts + at * splits, splits, SPLITS) + 0.0
            masses1 = tl.load(base_sums + at.to(tl.int64) * blocks + j, mask=j < blocks, other=0)
            of_all = log_mass(tl.sum(masses1, 0))
            base = (x.to(tl.float64) - m1.to(tl.float64) - of_all).to(tl.float32)
    tl.store(tokens + at, token.to(tl.int64))
    tl.store(logprobs + at, logprob)
    tl.store(kept_out + at, tl.where(status == OK, kept, 0))
    tl.store(status_out + at, status.to(tl.uint8))
    if BASE:
        tl.store(base_logprobs + at, base)
    if LOG_MASS:
        tl.store(log_masses + at, log_kept)
