"""Edited rows: one kernel writes them in float32, for the kernels of sampling to read."""

import triton
import triton.language as tl

# What is done to rows, as bits.
LISTS = tl.constexpr(1)  # of edits
GIVEN = tl.constexpr(2)  # which are values
MASKS = tl.constexpr(4)  # words of what is allowed


@triton.jit
def _first_from(ids, low, high, id):
    """Returns the place of the first of ascending ids in [low, high) that is at least `id`."""
    while low < high:
        middle = (low + high) // 2
        below = tl.load(ids + middle) < id
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def _allowed(words, ids, mask):
    """Whether ids are allowed by a row's words."""
    word = tl.load(words + (ids >> 5), mask=mask, other=0)
    return ((word >> (ids & 31)) & 1) != 0


@triton.jit
def _changed(x, columns, at, count, mask, CHANGES: tl.constexpr):
    """Returns what edits make of their logits; every operation is rounded once."""
    first = tl.load(columns + at, mask=mask, other=0.0)
    if GIVEN & CHANGES:
        return first
    penalty = tl.load(columns + count + at, mask=mask, other=1.0)
    post = tl.load(columns + 2 * count + at, mask=mask, other=0.0)
    last = tl.load(columns + 3 * count + at, mask=mask, other=0.0)
    y = x + first
    y = tl.where(y > 0, tl.div_rn(y, penalty), y * penalty) + post + last
    return tl.where(x == float("-inf"), x, y)


@triton.jit(do_not_specialize=["v", "row_step", "count", "word_step"])
def edit_kernel(
    logits, row_step, v, ids, offsets, columns, count, words, word_step, out,
    CHANGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes a block of a row: its logits, what is allowed of them, then those in the lists."""
    TOGETHER: tl.constexpr = BLOCK // 16
    row, begin = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    logits += row * row_step
    words += row * word_step
    out += row * v
    at = begin + tl.arange(0, BLOCK)
    there = at < v
    x = tl.load(logits + at, mask=there, other=float("-inf")).to(tl.float32)
    if MASKS & CHANGES:
        x = tl.where(_allowed(words, at, there), x, float("-inf"))
    tl.store(out + at, x, mask=there)
    if LISTS & CHANGES:
        low, high = tl.load(offsets + row), tl.load(offsets + row + 1)
        place = _first_from(ids, low, high, begin)
        last = _first_from(ids, place, high, tl.minimum(begin + BLOCK, v))
        tl.debug_barrier()  # other threads of this program have written these logits
        while place < last:
            some = place + tl.arange(0, TOGETHER)
            mask = some < last
            id = tl.load(ids + some, mask=mask, other=0)
            y = tl.load(logits + id, mask=mask, other=0.0).to(tl.float32)
            y = _changed(y, columns, some, count, mask, CHANGES)
            if MASKS & CHANGES:
                y = tl.where(_allowed(words, id, mask), y, float("-inf"))
            tl.store(out + id, y, mask=mask)
            place += TOGETHER


@triton.jit(do_not_specialize=["v", "row_step", "count"])
def gradient_kernel(
    logits, row_step, v, ids, offsets, columns, count, dy, dgiven,
    CHANGES: tl.constexpr, GRADIENT: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Takes the gradient of a row's edited logits to the logits, in place, and to given values."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_step
    dy += row * v
    place, last = tl.load(offsets + row), tl.load(offsets + row + 1)
    while place < last:
        some = place + tl.arange(0, TOGETHER)
        id = tl.load(ids + some, mask=some < last, other=0)
        mask = (some < last) & (id < v)
        g = tl.load(dy + id, mask=mask, other=0.0)
        if GRADIENT:
            tl.store(dgiven + some, g, mask=some < last)
        if GIVEN & CHANGES:
            g = tl.zeros_like(g)
        else:
            x = tl.load(logits + id, mask=mask, other=0.0).to(tl.float32)
            penalty = tl.load(columns + count + some, mask=mask, other=1.0)
            up = x + tl.load(columns + some, mask=mask, other=0.0) > 0
            g = tl.where(up, tl.div_rn(g, penalty), g * penalty)
            g = tl.where(x == float("-inf"), 0.0, g)
        tl.store(dy + id, g, mask=mask)
        place += TOGETHER
