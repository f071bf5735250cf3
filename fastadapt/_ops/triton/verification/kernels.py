"""Drafts are judged, one program a sequence; the token behind those that stand is drawn by many.

Rows and drafts have been decided: what their filters come to is in their records. The law of a row
is made of integers, as `reference.verification` makes it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastadapt._ops.triton.arithmetic import LAST_ID, log_mass, masses, survives
from fastadapt._ops.triton.bundles import Row, row_at
from fastadapt._ops.triton.rows import (
    BOUNDS_KEPT,
    BOUNDS_STATUS,
    BOUNDS_TOTAL,
    OK,
    TEMPERATURE,
    follow,
    inverse_of,
    knobs_of,
    largest_of,
    load_bounds,
    load_knob,
    load_scaled,
    marks_of,
    parts_of,
)

BAD_DRAFT = tl.constexpr(5)
UNIT = tl.constexpr(1099511627776.0)  # 2^40
# What is left to do for a sequence.
DONE = tl.constexpr(0)
FROM_ROW = tl.constexpr(1)  # the token behind its drafts is drawn from its row
FROM_REST = tl.constexpr(2)  # or from what the row has beyond a rejected draft


class Sequences(NamedTuple):
    """N sequences of K drafts."""

    draft: Any  # (N, K) int64
    lengths: Any  # (N,) int64
    seeds: Any  # (N,) int64
    positions: Any  # (N,) int64


class Verdicts(NamedTuple):
    """The outputs, and what is left to do."""

    tokens: Any  # (N, K + 1) int64
    accepted: Any  # (N,) int64
    logprobs: Any  # (N, K + 1) float32
    kept: Any  # (N, K + 1) int32
    status: Any  # (N, K + 1) uint8
    state: Any  # (N,) int32
    sums: Any  # (N, 2, blocks) int64: masses of what the token is drawn from, and of the row alone


class Decided(NamedTuple):
    """Decided rows, and the knobs of their sequences."""

    rows: Any
    knobs: Any
    scratch: Any


class Law(NamedTuple):
    """The distribution of a row."""

    row: Any
    bounds: Any
    status: Any
    total: Any  # mass of the survivors, 1 in a bad row
    kept: Any


@triton.jit
def _law_of(decided, asked, sequence, at, sizes):
    """Returns the law of a row of a sequence; the first axis of the grid is of sequences."""
    _, knobs = knobs_of(decided.knobs, asked, sequence)
    inverse = inverse_of(load_knob(knobs, TEMPERATURE))
    parts = parts_of(decided.scratch, asked, at, decided.rows.v, sizes)
    m = largest_of(parts, sizes.SPLITS) * inverse + 0.0
    record = marks_of(decided.scratch, at) + decided.scratch.BOUNDS
    status, total = tl.load(record + BOUNDS_STATUS), tl.load(record + BOUNDS_TOTAL)
    row = Row(row_at(decided.rows, at), decided.rows.v, inverse, m)
    kept = tl.load(record + BOUNDS_KEPT)
    return Law(row, load_bounds(record), status, tl.where(status == OK, total, 1), kept)


@triton.jit
def _masses_of(law, ids):
    """Returns the integer masses of survivors, 0 for others."""
    s = load_scaled(law.row, ids)
    alive = survives(s, ids, law.row.m, law.bounds)
    return tl.where(alive, masses(s - law.row.m), 0)


@triton.jit
def _shares(law, ids):
    """Returns probabilities in units of 2^-40, rounded down."""
    return (_masses_of(law, ids).to(tl.float64) * (UNIT / law.total.to(tl.float64))).to(tl.int64)


@triton.jit
def _random(sequences, sequence, i, stream):
    """Returns two numbers of 64 bits for row i of a sequence."""
    position = tl.load(sequences.positions + sequence) + i
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    x0, x1, x2, x3 = tl.philox(
        tl.load(sequences.seeds + sequence), low, high, (zero + stream).to(tl.uint32), zero
    )
    first = x0.to(tl.uint64) + (x1.to(tl.uint64) << 32)
    return first, x2.to(tl.uint64) + (x3.to(tl.uint64) << 32)


@triton.jit
def _store(out, at, token, logprob, kept, status):
    """Stores what is said of a row."""
    tl.store(out.tokens + at, token)
    tl.store(out.logprobs + at, logprob)
    tl.store(out.kept + at, kept)
    tl.store(out.status + at, status)


@triton.jit
def _store_token(out, at, law, token):
    """Stores a token of a good row."""
    s = tl.load(law.row.logits + token).to(tl.float32) * law.row.inverse
    logprob = s.to(tl.float64) - law.row.m.to(tl.float64) - log_mass(law.total)
    _store(out, at, token, logprob.to(tl.float32), law.kept.to(tl.int32), law.status.to(tl.uint8))


@triton.jit
def _end(out, sequence, accepted, k):
    """Stores how many drafts stand, and that nothing is behind the token after them."""
    tl.store(out.accepted + sequence, accepted.to(tl.int64))
    for i in range(accepted + 1, k + 1):
        tl.store(out.tokens + sequence * (k + 1) + i, accepted.to(tl.int64) * 0 - 1)
        tl.store(out.logprobs + sequence * (k + 1) + i, 0.0)
        tl.store(out.kept + sequence * (k + 1) + i, 0)
        tl.store(out.status + sequence * (k + 1) + i, 0)


@triton.jit(do_not_specialize=["k"])
def end_kernel(sequences, k, out, PDL: tl.constexpr):
    """Ends sequences whose rows all have their tokens where a draft is another."""
    follow(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    length = tl.load(sequences.lengths + sequence)
    i = tl.full([], 0, tl.int32)
    going = length > 0
    while going:
        token = tl.load(out.tokens + sequence * (k + 1) + i)
        stands = token == tl.load(sequences.draft + sequence * k + i)
        i += stands.to(tl.int32)
        going = stands & (i < length)
    _end(out, sequence, i, k)


@triton.jit(do_not_specialize=["p_asked", "q_asked", "k"])
def judge_kernel(
    p_all, q_all, p_asked, q_asked, sizes, sequences, k, out, PDL: tl.constexpr
):  # fmt: skip
    """Judges the drafts of a sequence until one does not stand, by U Q < 2^64 P."""
    follow(PDL)
    sequence = tl.program_id(0)
    length = tl.load(sequences.lengths + sequence)
    i = tl.full([], 0, tl.int32)
    state = tl.full([], FROM_ROW, tl.int32)
    going = length > 0
    while going:
        at = sequence * (k + 1) + i
        p = _law_of(p_all, p_asked, sequence, at, sizes)
        q = _law_of(q_all, q_asked, sequence, sequence * k + i, sizes)
        token = tl.load(sequences.draft + sequence.to(tl.int64) * k + i)
        status = tl.where((p.status == OK) & (q.status != OK), BAD_DRAFT, p.status)
        known = (token >= 0) & (token < p.row.v)
        id = tl.where(known, token, 0).to(tl.int32)
        coin, _ = _random(sequences, sequence, i, 1)
        of_draft = tl.umulhi(coin, _shares(q, id).to(tl.uint64)).to(tl.int64)
        stands = known & (of_draft < _shares(p, id)) & (status == OK)
        if stands:
            _store_token(out, at, p, token)
        state = tl.where(stands, FROM_ROW, tl.where(status == OK, FROM_REST, DONE))
        if state == DONE:
            nan = p.row.m * 0.0 + float("nan")
            _store(out, at, token * 0 - 1, nan, 0, status.to(tl.uint8))
        i += stands.to(tl.int32)
        going = stands & (i < length)
    if state == FROM_ROW:  # of which nothing is known yet
        p = _law_of(p_all, p_asked, sequence, sequence * (k + 1) + i, sizes)
        if p.status != OK:
            state = tl.full([], DONE, tl.int32)
            nan = p.row.m * 0.0 + float("nan")
            token = tl.full([], -1, tl.int64)
            _store(out, sequence * (k + 1) + i, token, nan, 0, p.status.to(tl.uint8))
    tl.store(out.state + sequence, state)
    _end(out, sequence.to(tl.int64), i, k)


@triton.jit
def _left(p, q_all, q_asked, sequence, draft, state, ids, sizes):
    """Returns the masses that a token is drawn by, of a row alone and less those of a draft."""
    own = tl.zeros_like(ids).to(tl.int64)
    rest = own
    if state == FROM_ROW:
        own = _masses_of(p, ids)
        rest = own
    else:
        own = _shares(p, ids)
        q = _law_of(q_all, q_asked, sequence, draft, sizes)
        rest = tl.maximum(own - _shares(q, ids), 0)
    return own, rest


@triton.jit(do_not_specialize=["p_asked", "q_asked", "k"])
def left_kernel(
    p_all, q_all, p_asked, q_asked, sizes, sequences, k, out, PDL: tl.constexpr
):  # fmt: skip
    """Sums those masses over a block of a row."""
    follow(PDL)
    sequence, block = tl.program_id(0), tl.program_id(1)
    state = tl.load(out.state + sequence)
    if state != DONE:
        ids = block * sizes.BLOCK + tl.arange(0, sizes.BLOCK)
        i, blocks = tl.load(out.accepted + sequence).to(tl.int32), tl.num_programs(1)
        p = _law_of(p_all, p_asked, sequence, sequence * (k + 1) + i, sizes)
        own, rest = _left(p, q_all, q_asked, sequence, sequence * k + i, state, ids, sizes)
        sums = out.sums + 2 * sequence.to(tl.int64) * blocks + block
        tl.store(sums, tl.sum(rest, 0))
        tl.store(sums + blocks, tl.sum(own, 0))


@triton.jit(do_not_specialize=["p_asked", "q_asked", "k"])
def draw_kernel(
    p_all, q_all, p_asked, q_asked, sizes, sequences, k, out, PDL: tl.constexpr
):  # fmt: skip
    """Draws the token by the sums of blocks, then within one block."""
    follow(PDL)
    sequence = tl.program_id(0)
    state = tl.load(out.state + sequence)
    if state != DONE:
        i = tl.load(out.accepted + sequence).to(tl.int32)
        at = sequence * (k + 1) + i
        p = _law_of(p_all, p_asked, sequence, at, sizes)
        j, blocks = tl.arange(0, sizes.BLOCKS), tl.cdiv(p.row.v, sizes.BLOCK)
        sums = out.sums + 2 * sequence.to(tl.int64) * blocks + j
        of_rest = tl.load(sums, mask=j < blocks, other=0)
        nothing = tl.sum(of_rest, 0) == 0  # a row has no more than its draft anywhere
        mass = tl.where(nothing, tl.load(sums + blocks, mask=j < blocks, other=0), of_rest)
        own, _ = _random(sequences, sequence, i, 0)
        _, other = _random(sequences, sequence, i, 1)
        random = tl.where(state == FROM_ROW, own, other)
        target = tl.umulhi(random, tl.sum(mass, 0).to(tl.uint64)).to(tl.int64)
        running = tl.cumsum(mass, 0)
        block = tl.sum(((running <= target) & (j < blocks)).to(tl.int32), 0)
        before = tl.sum(tl.where(j < block, mass, 0), 0)
        ids = block * sizes.BLOCK + tl.arange(0, sizes.BLOCK)
        own, rest = _left(p, q_all, q_asked, sequence, sequence * k + i, state, ids, sizes)
        mass = tl.where(nothing, own, rest)
        token = tl.min(tl.where(before + tl.cumsum(mass, 0) > target, ids, LAST_ID), 0)
        _store_token(out, at, p, token.to(tl.int64))
