"""The most probable tokens under the base law, and the rank of a token there."""

import triton
import triton.language as tl

from fastadapt.kernels.arithmetic import ANY_RANK, LAST_ID, keys, log_mass, ranks
from fastadapt.kernels.rows import OK, largest_of, load_scaled
from fastadapt.kernels.select import cut_of_row


@triton.jit
def top_kernel(
    logits,
    stride,
    v,
    parts,
    splits,
    blocks,
    status,
    tokens,
    number,
    spare,
    spare_ids,  # (rows, LIST): the most probable ids, in no order
    token_ranks,  # (rows,)
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
    BINS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """A cut by count, and a pass that collects what is above it."""
    at = tl.program_id(0)
    row = logits + at.to(tl.int64) * stride
    spare += at.to(tl.int64) * LIST
    spare_ids += at.to(tl.int64) * LIST
    token = tl.load(tokens + at)
    above = tl.zeros([BLOCK], tl.int32)
    if tl.load(status + at) == OK:
        m = largest_of(parts + at * splits, splits, SPLITS) + 0.0
        none = tl.full([], 0, tl.int64)
        any_rank = none + ANY_RANK
        law = (any_rank, none, any_rank, none, any_rank, any_rank, none.to(tl.float32))
        no = token < 0
        cut = cut_of_row(
            row, v, tl.full([], 1.0, tl.float32), m, law, no, no, none + number, spare, spare_ids,
            BLOCK, LIST, BINS,
        )  # fmt: skip
        own = ranks(keys(tl.load(row + token).to(tl.float32)), token.to(tl.int32))
        tl.debug_barrier()  # the spare list may still be read
        filled = tl.full([], 0, tl.int32)
        for block in range(blocks):
            ids = block * BLOCK + tl.arange(0, BLOCK)
            rank = ranks(keys(load_scaled(row, ids, v, 1.0)), ids)
            above += ((rank >= own) & (ids < v)).to(tl.int32)
            hit = (rank >= cut) & (ids < v)
            place = filled + tl.cumsum(hit.to(tl.int32), 0)
            filled = tl.max(place, 0)
            tl.store(spare_ids + place - 1, ids, mask=hit & (place <= number))
    tl.store(token_ranks + at, tl.sum(above, 0))


@triton.jit
def sort_kernel(
    logits,
    stride,
    parts,
    splits,
    base_sums,
    blocks,
    status,
    number,
    spare_ids,
    top_ids,  # (rows, number)
    top_logprobs,
    LIST: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOP: tl.constexpr,
):
    """Puts them in the order of their ranks, and scores them."""
    at = tl.program_id(0)
    row = logits + at.to(tl.int64) * stride
    place = tl.arange(0, TOP)
    there = place < number
    out = at.to(tl.int64) * number + place
    if tl.load(status + at) == OK:
        m = largest_of(parts + at * splits, splits, SPLITS) + 0.0
        collected = tl.load(spare_ids + at.to(tl.int64) * LIST + place, mask=there, other=0)
        x = tl.load(row + collected, mask=there, other=float("-inf")).to(tl.float32)
        rank = tl.sort(tl.where(there, ranks(keys(x), collected), ANY_RANK), descending=True)
        ids = LAST_ID - (rank & 0xFFFFFFFF)
        x = tl.load(row + ids, mask=there, other=float("-inf")).to(tl.float32)
        j = tl.arange(0, BLOCKS)
        base = tl.load(base_sums + at.to(tl.int64) * blocks + j, mask=j < blocks, other=0)
        log_z = log_mass(tl.sum(base, 0))
        value = (x.to(tl.float64) - m.to(tl.float64) - log_z).to(tl.float32)
        tl.store(top_ids + out, ids, mask=there)
        tl.store(top_logprobs + out, value, mask=there)
    else:
        tl.store(top_ids + out, place.to(tl.int64) * 0 - 1, mask=there)
        tl.store(top_logprobs + out, place.to(tl.float32) * 0 + float("nan"), mask=there)
