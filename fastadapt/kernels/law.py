"""What is made of a decided row without a draw: its law in memory, or a token's score under it."""

import triton
import triton.language as tl

from fastadapt.kernels.arithmetic import keys, log_mass, ranks
from fastadapt.kernels.decide import decide_row, first_largest, temperature_of
from fastadapt.kernels.rows import (
    LAW_BAND,
    LAW_CENTRE,
    LAW_CUT,
    LAW_CUTOFF,
    LAW_CUTOFF_GUARD,
    LAW_GUARD,
    LAW_KEPT,
    LAW_MASS,
    LAW_SIZE,
    LAW_STATUS,
    LAW_TOTAL,
    OK,
    TEMPERATURE,
    largest_of,
    load_knob,
    survives,
)
from fastadapt.kernels.scan import knobs_of


@triton.jit
def law_kernel(
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
    laws,  # (rows, LAW_SIZE) int64
    ALL_WEIGHED: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
    BINS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Stores the law of a row; where T is 0, the one that leaves the lowest id of its maximum."""
    at = tl.program_id(0)
    law, m, inverse, status, _, kept, total = decide_row(
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
    cut = law[0]
    if (status == OK) & (temperature_of(knobs, at, knob_step, row_step) == 0):
        row = logits + at.to(tl.int64) * stride
        list_at = at.to(tl.int64) * LIST
        number = tl.load(count + at)
        best = first_largest(
            row, v, inverse, m, number, listed + list_at, listed_ids + list_at, BLOCK, LIST
        )
        cut = ranks(keys(m), best)
    laws += at.to(tl.int64) * LAW_SIZE
    tl.store(laws + LAW_CUT, cut)
    tl.store(laws + LAW_MASS, law[1])
    tl.store(laws + LAW_GUARD, law[2])
    tl.store(laws + LAW_CUTOFF, law[3])
    tl.store(laws + LAW_CUTOFF_GUARD, law[4])
    tl.store(laws + LAW_BAND, law[5])
    tl.store(laws + LAW_CENTRE, law[6].to(tl.int32, bitcast=True).to(tl.int64))
    tl.store(laws + LAW_STATUS, status.to(tl.int64))
    tl.store(laws + LAW_KEPT, kept.to(tl.int64))
    tl.store(laws + LAW_TOTAL, total)


@triton.jit
def score_kernel(
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
    base_surprisal_sums,
    tokens,
    ignore_index,
    logprobs,  # (rows, adaptors)
    log_norms,
    kept_out,
    base_logprobs,  # (rows,)
    entropies,
    ALL_WEIGHED: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
    BINS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Decides a row and scores a token under its law; the first adaptor's program, the base law."""
    virtual = tl.program_id(0)
    at = virtual // adaptors
    law, m, inverse, status, _, kept, total = decide_row(
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
    token = tl.load(tokens + at)
    ignored = token == ignore_index
    known = (token >= 0) & (token < v)
    x = tl.load(row + tl.where(known, token, 0)).to(tl.float32)
    m1 = largest_of(parts + at * splits, splits, SPLITS) + 0.0
    usable = known & (m1 == m1) & (tl.abs(m1) < float("inf")) & (ignored == 0)
    bad = tl.where(ignored, 0.0, float("nan"))
    j = tl.arange(0, BLOCKS)
    base_at = at.to(tl.int64) * blocks + j
    z = tl.sum(tl.load(base_sums + base_at, mask=j < blocks, other=0), 0)
    log_z = log_mass(tl.where(usable, z, 1))
    base = (x.to(tl.float64) - m1.to(tl.float64) - log_z).to(tl.float32)
    scored = usable & (status == OK)
    _, own_knobs = knobs_of(knobs, virtual, adaptors, knob_step, row_step)
    scored &= load_knob(own_knobs, TEMPERATURE, knob_step) > 0
    s = x * inverse
    log_s = log_mass(tl.where(scored, total, 1))
    logprob = (s.to(tl.float64) - m.to(tl.float64) - log_s).to(tl.float32)
    logprob = tl.where(survives(s, token.to(tl.int32), m, law), logprob, float("-inf"))
    shift = m.to(tl.float64) - m1.to(tl.float64) * inverse.to(tl.float64)
    log_norm = (shift + log_s - log_z * inverse.to(tl.float64)).to(tl.float32)
    tl.store(logprobs + virtual, tl.where(scored, logprob, bad))
    tl.store(log_norms + virtual, tl.where(scored, log_norm, bad))
    tl.store(kept_out + virtual, tl.where(scored, kept, 0))
    if virtual % adaptors == 0:
        u = tl.sum(tl.load(base_surprisal_sums + base_at, mask=j < blocks, other=0), 0)
        entropy = (log_z + u.to(tl.float64) / tl.where(usable, z, 1).to(tl.float64)).to(tl.float32)
        tl.store(base_logprobs + at, tl.where(usable, base, bad))
        tl.store(entropies + at, tl.where(usable, entropy, bad))
