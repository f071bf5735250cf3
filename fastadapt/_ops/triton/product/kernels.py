"""A head's product with the sums of its logits as its epilogue: no logit is written but to keep it.

Programs stay and take one block of rows and ids after another, rows first, so that a block of the
head is in the L2 cache when it is read again. What a row's entries of a block come to is written,
and added up in the order of the ids: sums depend on no other row and on no program's speed.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastadapt._ops.triton.bundles import (
    NUM_TILE_STATS,
    OTHERS_MAX,
    OTHERS_REST,
    OTHERS_SQUARED,
    OTHERS_SUM,
    OTHERS_WEIGHTED,
)
from fastadapt._ops.triton.linear.kernels import LEAST_EXPONENT, NOTHING, tanh, without_nan

PARTS = tl.constexpr(
    5
)  # of a row and block: largest, sums of e, e d, e^2, and of e below the largest


class Head(NamedTuple):
    """The head's part that is no matrix."""

    width: object  # ids of the tile
    first: object
    labels: object  # (n, K) int64, rows of the head; negative: elsewhere
    labels_a_row: object
    bias: object  # (V,) of the head
    numbers: object  # (2,) float64: the scale, the softcap


class Kind(NamedTuple):
    """The compile-time constants."""

    BIASED: object
    CAPPED: object
    MOMENTS: object  # whether the sums of e d, e^2 and below the largest are made
    KEEP: object  # whether the products are written
    ROWS: object  # of a block
    IDS: object
    DEPTH: object  # of hidden states at a time


@triton.jit
def product_sum_kernel(hidden, weight, head, parts, kept, kept_stride, n, depth, kind):
    """Writes the sums of every block of logits, (width / IDS, n, PARTS) float32.

    `hidden` (n, depth) and `weight` (width, depth) are descriptors, which give 0 outside.
    """
    row_blocks, id_blocks = tl.cdiv(n, kind.ROWS), tl.cdiv(head.width, kind.IDS)
    scale, cap = tl.load(head.numbers).to(tl.float32), tl.load(head.numbers + 1).to(tl.float32)
    blocks = row_blocks * id_blocks
    for at in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row, first = at % row_blocks * kind.ROWS, at // row_blocks * kind.IDS
        z = tl.zeros([kind.ROWS, kind.IDS], tl.float32)
        for begin in range(0, depth, kind.DEPTH):
            z = tl.dot(hidden.load([row, begin]), weight.load([first, begin]).T, z)
        rows, ids = row + tl.arange(0, kind.ROWS), first + tl.arange(0, kind.IDS)
        here = rows < n
        if kind.KEEP:
            place = kept + rows.to(tl.int64)[:, None] * kept_stride + ids[None, :]
            inside = here[:, None] & (ids < head.width)[None, :]
            tl.store(place, z.to(kept.dtype.element_ty), mask=inside)
        if kind.BIASED:
            bias = tl.load(head.bias + head.first + ids, mask=ids < head.width, other=0.0)
            z += bias.to(tl.float32)[None, :]
        z = z * scale
        if kind.CAPPED:
            z = tanh(z / cap, False) * cap
        z = tl.where((ids < head.width)[None, :], z, NOTHING)
        for k in range(head.labels_a_row):
            label = tl.load(head.labels + rows * head.labels_a_row + k, mask=here, other=-1)
            z = tl.where(ids[None, :] == (label - head.first)[:, None], NOTHING, z)
        top = tl.max(without_nan(z), 1)
        d = z - tl.where(top == NOTHING, 0.0, top)[:, None]
        e = tl.exp(d)
        out = parts + (at // row_blocks * n + rows).to(tl.int64) * PARTS
        tl.store(out, top, mask=here)
        tl.store(out + 1, tl.sum(e, 1), mask=here)
        if kind.MOMENTS:
            tl.store(out + 2, tl.sum(e * tl.maximum(d, LEAST_EXPONENT), 1), mask=here)
            tl.store(out + 3, tl.sum(e * e, 1), mask=here)
            tl.store(out + 4, tl.sum(tl.where(d < 0, e, 0.0), 1), mask=here)


@triton.jit
def _shrunk(top, high, sums, weighted, squared, rest):
    """Makes sums below `top` those below `high`; 0 where there is nothing."""
    shift = top - tl.where(high == NOTHING, 0.0, high)
    shrink = tl.exp(shift)
    weighted = shrink * (weighted + sums * tl.maximum(shift, -1e300))
    rest = tl.where(shift < 0, sums * shrink, rest)
    return sums * shrink, weighted, squared * shrink * shrink, rest


@triton.jit
def add_parts_kernel(parts, number, n, stats, MOMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the blocks' sums of each row to its statistics; one program has one row."""
    at = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK)
    some = parts + (block.to(tl.int64) * n + at) * PARTS
    has = block < number
    top = tl.load(some, mask=has, other=NOTHING).to(tl.float64)
    sums = tl.load(some + 1, mask=has, other=0.0).to(tl.float64)
    weighted, squared, rest = sums * 0.0, sums * 0.0, sums * 0.0
    stats += at * NUM_TILE_STATS
    before, total = tl.load(stats + OTHERS_MAX), tl.load(stats + OTHERS_SUM)
    high = tl.maximum(before, tl.max(top, 0))
    old_weighted, old_squared, old_rest = total * 0.0, total * 0.0, total * 0.0
    if MOMENTS:
        weighted = tl.load(some + 2, mask=has, other=0.0).to(tl.float64)
        squared = tl.load(some + 3, mask=has, other=0.0).to(tl.float64)
        rest = tl.load(some + 4, mask=has, other=0.0).to(tl.float64)
        old_weighted = tl.load(stats + OTHERS_WEIGHTED)
        old_squared, old_rest = tl.load(stats + OTHERS_SQUARED), tl.load(stats + OTHERS_REST)
    old = _shrunk(before, high, total, old_weighted, old_squared, old_rest)
    new = _shrunk(top, high, sums, weighted, squared, rest)
    tl.store(stats + OTHERS_MAX, high)
    tl.store(stats + OTHERS_SUM, old[0] + tl.sum(new[0], 0))
    if MOMENTS:
        tl.store(stats + OTHERS_WEIGHTED, old[1] + tl.sum(new[1], 0))
        tl.store(stats + OTHERS_SQUARED, old[2] + tl.sum(new[2], 0))
        tl.store(stats + OTHERS_REST, old[3] + tl.sum(new[3], 0))
