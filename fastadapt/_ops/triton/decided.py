"""What is made of a decided row without a draw: its bounds in memory, or the score of a token."""

import triton
import triton.language as tl

from fastadapt._ops.triton.arithmetic import log_mass
from fastadapt._ops.triton.decide import decide, found_of, held_of
from fastadapt._ops.triton.rows import BOUNDS_SIZE, OK, knobs_of, largest_of, store_bounds, survives


@triton.jit
def bounds_kernel(rows, adaptors, parts, lists, weights, all_bounds, asked, sizes):
    """Stores the bounds of a row, (rows, BOUNDS_SIZE) int64."""
    at = tl.program_id(0)
    _, knobs = knobs_of(adaptors, at)
    found = found_of(lists, at, held_of(lists, at, knobs, sizes), sizes)
    decided = decide(rows, adaptors, parts, lists, weights, at, found, asked, sizes)
    store_bounds(all_bounds + at.to(tl.int64) * BOUNDS_SIZE, decided.bounds, decided.status)


@triton.jit
def score_kernel(rows, adaptors, parts, lists, weights, labels, out, asked, sizes):
    """Decides a row and scores a token, the first program also under the base distribution."""
    virtual = tl.program_id(0)
    at = virtual // adaptors.number
    _, knobs = knobs_of(adaptors, virtual)
    found = found_of(lists, virtual, held_of(lists, virtual, knobs, sizes), sizes)
    decided = decide(rows, adaptors, parts, lists, weights, virtual, found, asked, sizes)
    row = decided.row
    token = tl.load(labels.ids + at)
    ignored = token == labels.ignore_index
    known = (token >= 0) & (token < row.v)
    x = tl.load(row.logits + tl.where(known, token, 0)).to(tl.float32)
    m1 = largest_of(parts, at, sizes.SPLITS)
    usable = known & (m1 == m1) & (tl.abs(m1) < float("inf")) & (ignored == 0)
    bad = tl.where(ignored, 0.0, float("nan"))
    j = tl.arange(0, sizes.BLOCKS)
    there = j < weights.blocks
    base_at = at.to(tl.int64) * weights.blocks + j
    z = tl.sum(tl.load(weights.base_sums + base_at, mask=there, other=0), 0)
    log_z = log_mass(tl.where(usable, z, 1))
    base = (x.to(tl.float64) - m1.to(tl.float64) - log_z).to(tl.float32)
    scored = usable & (decided.status == OK) & (decided.greedy == 0)
    s = x * row.inverse
    log_s = log_mass(tl.where(scored, decided.total, 1))
    logprob = (s.to(tl.float64) - row.m.to(tl.float64) - log_s).to(tl.float32)
    alive = survives(s, token.to(tl.int32), row.m, decided.bounds)
    logprob = tl.where(alive, logprob, float("-inf"))
    inverse = row.inverse.to(tl.float64)
    shift = row.m.to(tl.float64) - m1.to(tl.float64) * inverse
    log_norm = (shift + log_s - log_z * inverse).to(tl.float32)
    tl.store(out.logprobs + virtual, tl.where(scored, logprob, bad))
    tl.store(out.log_norms + virtual, tl.where(scored, log_norm, bad))
    tl.store(out.kept + virtual, tl.where(scored, decided.kept, 0))
    if virtual % adaptors.number == 0:
        u = tl.load(weights.base_surprisal_sums + base_at, mask=there, other=0)
        u = tl.sum(u, 0)
        entropy = (log_z + u.to(tl.float64) / tl.where(usable, z, 1).to(tl.float64)).to(tl.float32)
        tl.store(out.base_logprobs + at, tl.where(usable, base, bad))
        tl.store(out.entropies + at, tl.where(usable, entropy, bad))
