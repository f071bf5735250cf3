"""The most probable tokens under the base distribution, and the rank of a token there."""

import triton
import triton.language as tl

from fastadapt._ops.triton.arithmetic import ANY_RANK, LAST_ID, keys, log_mass, ranks
from fastadapt._ops.triton.bundles import List, Row
from fastadapt._ops.triton.rows import OK, bounds_from, largest_of, load_scaled, row_at
from fastadapt._ops.triton.select import cut_of_row


@triton.jit
def top_kernel(
    rows, parts, drawn, number, lists, token_ranks,
    BLOCK: tl.constexpr, LIST: tl.constexpr, BINS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """A cut by count, and a pass that collects what is above it in the spare list, in no order."""
    at = tl.program_id(0)
    spare = List(lists.spare + at.to(tl.int64) * LIST, lists.spare_ids + at.to(tl.int64) * LIST)
    token = tl.load(drawn.tokens + at)
    above = tl.zeros([BLOCK], tl.int32)
    if tl.load(drawn.status + at) == OK:
        one = tl.full([], 1.0, tl.float32)
        row = Row(row_at(rows, at), rows.v, one, largest_of(parts, at, SPLITS))
        no = token < 0
        wanted = tl.full([], 0, tl.int64) + number
        cut = cut_of_row(row, bounds_from(ANY_RANK), no, no, wanted, spare, BLOCK, LIST, BINS)
        own = ranks(keys(tl.load(row.logits + token).to(tl.float32)), token.to(tl.int32))
        tl.debug_barrier()  # the spare list may still be read
        filled = tl.full([], 0, tl.int32)
        for block in range(tl.cdiv(rows.v, BLOCK)):
            ids = block * BLOCK + tl.arange(0, BLOCK)
            rank = ranks(keys(load_scaled(row, ids)), ids)
            above += ((rank >= own) & (ids < rows.v)).to(tl.int32)
            hit = (rank >= cut) & (ids < rows.v)
            place = filled + tl.cumsum(hit.to(tl.int32), 0)
            filled = tl.max(place, 0)
            tl.store(spare.ids + place - 1, ids, mask=hit & (place <= number))
    tl.store(token_ranks + at, tl.sum(above, 0))


@triton.jit
def sort_kernel(
    rows, parts, weights, drawn, number, lists,
    top_ids,  # (rows, number)
    top_logprobs,
    LIST: tl.constexpr, SPLITS: tl.constexpr, BLOCKS: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """Puts them in the order of their ranks, and scores them."""
    at = tl.program_id(0)
    row = row_at(rows, at)
    place = tl.arange(0, TOP)
    there = place < number
    out = at.to(tl.int64) * number + place
    if tl.load(drawn.status + at) == OK:
        m = largest_of(parts, at, SPLITS)
        collected = lists.spare_ids + at.to(tl.int64) * LIST + place
        collected = tl.load(collected, mask=there, other=0)
        x = tl.load(row + collected, mask=there, other=float("-inf")).to(tl.float32)
        rank = tl.sort(tl.where(there, ranks(keys(x), collected), ANY_RANK), descending=True)
        ids = LAST_ID - (rank & 0xFFFFFFFF)
        x = tl.load(row + ids, mask=there, other=float("-inf")).to(tl.float32)
        j = tl.arange(0, BLOCKS)
        base = weights.base_sums + at.to(tl.int64) * weights.blocks + j
        log_z = log_mass(tl.sum(tl.load(base, mask=j < weights.blocks, other=0), 0))
        value = (x.to(tl.float64) - m.to(tl.float64) - log_z).to(tl.float32)
        tl.store(top_ids + out, ids, mask=there)
        tl.store(top_logprobs + out, value, mask=there)
    else:
        tl.store(top_ids + out, place.to(tl.int64) * 0 - 1, mask=there)
        tl.store(top_logprobs + out, place.to(tl.float32) * 0 + float("nan"), mask=there)
