"""Products of pairs of rows, and weighted sums of rows: what a head does to a support.

Sums are of one order, by one program: the same bits in every run.
"""

import triton
import triton.language as tl


@triton.jit
def dot_kernel(
    hidden, weight, rows, ids, out, hidden_stride, weight_stride, h,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Multiplies a row of hidden states (N, H) with one of a weight (V, H), for each pair."""
    pair = tl.program_id(0)
    x = hidden + tl.load(rows + pair) * hidden_stride
    w = weight + tl.load(ids + pair) * weight_stride
    sums = tl.zeros([BLOCK], WIDE)
    for first in range(0, h, BLOCK):
        at = first + tl.arange(0, BLOCK)
        a = tl.load(x + at, mask=at < h, other=0.0).to(WIDE)
        sums += a * tl.load(w + at, mask=at < h, other=0.0).to(WIDE)
    tl.store(out + pair, tl.sum(sums, 0).to(tl.float64))


@triton.jit
def mix_kernel(
    source, gain, index, offsets, places, out, source_stride, h,
    AT_ONCE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sums rows of a source (M, H) by their gains, for each part of a list; rounds once.

    Part p is [offsets[p], offsets[p + 1]) of gains and indices, and goes to row places[p].
    """
    part = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(offsets + part), tl.load(offsets + part + 1)
    sums = tl.zeros([AT_ONCE, BLOCK], WIDE)
    for first in range(begin, end, AT_ONCE):
        k = first + tl.arange(0, AT_ONCE)
        g = tl.load(gain + k, mask=k < end, other=0.0).to(WIDE)
        row = tl.load(index + k, mask=k < end, other=0)
        here = (k < end)[:, None] & (at < h)[None, :]
        x = tl.load(source + row[:, None] * source_stride + at[None, :], mask=here, other=0.0)
        sums += g[:, None] * x.to(WIDE)
    out += tl.load(places + part) * h + at
    tl.store(out, tl.sum(sums, 0).to(out.dtype.element_ty), mask=at < h)
