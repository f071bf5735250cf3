"""The survivors of a chain of filters: a list of scaled logits and ids in memory, by id.

A token's place in the list takes its id's part in ranks: places ascend with ids.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastadapt._ops.triton.arithmetic import (
    ANY_RANK,
    ROUND,
    keys,
    masses,
    ranks,
    surprisals,
    survives,
)
from fastadapt._ops.triton.bundles import Bounds, List, Row, Tokens
from fastadapt._ops.triton.rows import load_scaled

LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32


class Figures(NamedTuple):
    """What one pass over survivors tells of them."""

    z: Any  # mass and surprisal mass
    u: Any
    top: Any  # the largest scaled logit and the smallest
    low: Any
    heaviest: Any  # the largest mass


@triton.jit
def list_of(lists, virtual, v):
    """Returns the list of a virtual row, with room for all of it."""
    room = (v + 31) // 32 * 32
    first = lists + virtual.to(tl.int64) * (2 * room)
    return List(first.to(tl.pointer_type(tl.float32)), first + room)


@triton.jit
def as_row(held, number, m):
    """Takes a list for a row, whose ids are places."""
    return Row(held.s, number, tl.full([], 1.0, tl.float32), m)


@triton.jit
def tokens_in(row, spare):
    """Takes all of a row for the tokens among which a cut is searched."""
    return Tokens(row, spare, tl.full([], -1, tl.int32))


@triton.jit
def list_row(row, held, greedy, BLOCK: tl.constexpr):
    """Lists what is above -inf in a row, or the first of the largest; returns the number."""
    number = tl.full([], 0, tl.int32)
    least = tl.where(greedy, row.m, float("-inf"))
    for block in range(tl.cdiv(row.v, BLOCK)):
        ids = block * BLOCK + tl.arange(0, BLOCK)
        s = load_scaled(row, ids)
        good = (s > float("-inf")) & (s >= least)
        place = number + tl.cumsum(good.to(tl.int32), 0)
        number = tl.max(place, 0)
        tl.store(held.s + place - 1, s, mask=good)
        tl.store(held.ids + place - 1, ids, mask=good)
    tl.debug_barrier()
    return tl.where(greedy, tl.minimum(number, 1), number)


@triton.jit
def drop(held, number, m, bounds, ceiling, inverse, BLOCK: tl.constexpr):
    """Drops from a list what is not within bounds, or above a ceiling; scales what is left.

    Returns how many are left above -inf, and the largest. A block is stored where it was or before,
    once all threads have read it.
    """
    left = tl.full([], 0, tl.int32)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    for block in range(tl.cdiv(number, BLOCK)):
        at = block * BLOCK + tl.arange(0, BLOCK)
        s = tl.load(held.s + at, mask=at < number, other=float("-inf"))
        ids = tl.load(held.ids + at, mask=at < number, other=0)
        alive = (at < number) & survives(s, at, m, bounds) & (ranks(keys(s), at) <= ceiling)
        s = tl.where(alive, s * inverse, float("-inf"))
        most = tl.maximum(most, s)
        alive &= s > float("-inf")
        place = left + tl.cumsum(alive.to(tl.int32), 0)
        left = tl.max(place, 0)
        tl.debug_barrier()
        tl.store(held.s + place - 1, s, mask=alive)
        tl.store(held.ids + place - 1, ids, mask=alive)
    tl.debug_barrier()
    return left, tl.max(most, 0)


@triton.jit
def figures_of(row, BLOCK: tl.constexpr):
    """Sums survivors, and finds the largest and the smallest."""
    z, u = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    heaviest = tl.zeros([BLOCK], tl.int64)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    low = tl.full([BLOCK], float("inf"), tl.float32)
    for block in range(tl.cdiv(row.v, BLOCK)):
        at = block * BLOCK + tl.arange(0, BLOCK)
        s = load_scaled(row, at)
        d = s - row.m
        mass = masses(d)
        z += mass
        u += surprisals(d)
        heaviest = tl.maximum(heaviest, mass)
        top = tl.maximum(top, s)
        low = tl.minimum(low, tl.where(at < row.v, s, float("inf")))
    return Figures(tl.sum(z, 0), tl.sum(u, 0), tl.max(top, 0), tl.min(low, 0), tl.max(heaviest, 0))


@triton.jit
def deviation_of(row, low, BLOCK: tl.constexpr):
    """Returns the standard deviation of survivors, the smallest of which is given.

    Their distances to m are multiples of a power of two, of which none has more than 2^20.
    """
    exponent = (tl.minimum(row.m - low, LARGEST).to(tl.int32, bitcast=True) >> 23) - 127
    per_unit = ((tl.minimum(19 - exponent, 127) + 127) << 23).to(tl.float32, bitcast=True)
    of_q, squares = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    for block in range(tl.cdiv(row.v, BLOCK)):
        at = block * BLOCK + tl.arange(0, BLOCK)
        d = tl.maximum(load_scaled(row, at) - row.m, -LARGEST)
        q = (d * -per_unit + ROUND) - ROUND
        q = tl.where(at < row.v, q, 0.0).to(tl.int64)
        of_q += q
        squares += q * q
    n = row.v.to(tl.float64)
    mean = tl.sum(of_q, 0).to(tl.float64) / n
    variance = tl.sum(squares, 0).to(tl.float64) / n - mean * mean
    sigma = tl.sqrt(tl.maximum(variance, 0.0)) / per_unit.to(tl.float64)
    return tl.where(variance > 0, sigma, 0.0)


@triton.jit
def best_of(row, BLOCK: tl.constexpr):
    """Returns the highest rank of survivors."""
    best = tl.full([BLOCK], ANY_RANK, tl.int64)
    for block in range(tl.cdiv(row.v, BLOCK)):
        at = block * BLOCK + tl.arange(0, BLOCK)
        rank = ranks(keys(load_scaled(row, at)), at)
        best = tl.maximum(best, tl.where(at < row.v, rank, ANY_RANK))
    return tl.max(best, 0)


@triton.jit
def gather(row, lowest, highest, out, BLOCK: tl.constexpr):
    """Copies the survivors between two ranks to a list: scaled logits and places."""
    number = tl.full([], 0, tl.int32)
    tl.debug_barrier()  # the list may still be read
    for block in range(tl.cdiv(row.v, BLOCK)):
        at = block * BLOCK + tl.arange(0, BLOCK)
        s = load_scaled(row, at)
        rank = ranks(keys(s), at)
        good = (at < row.v) & (rank >= lowest) & (rank <= highest)
        place = number + tl.cumsum(good.to(tl.int32), 0)
        number = tl.max(place, 0)
        tl.store(out.s + place - 1, s, mask=good)
        tl.store(out.ids + place - 1, at, mask=good)
    tl.debug_barrier()
    return number


@triton.jit
def weigh(row, sums, BLOCK: tl.constexpr):
    """Sums the masses of survivors by block, and returns their sum."""
    total = tl.full([], 0, tl.int64)
    for block in range(tl.cdiv(row.v, BLOCK)):
        at = block * BLOCK + tl.arange(0, BLOCK)
        here = tl.sum(masses(load_scaled(row, at) - row.m), 0)
        tl.store(sums + block, here)
        total += here
    return total


@triton.jit
def is_listed(held, number, ids):
    """Whether ids are in a list, whose ids ascend."""
    low, high = ids * 0, ids * 0 + number
    left = number
    while left > 0:
        middle = (low + high) // 2
        before = tl.load(held.ids + middle, mask=low < high, other=0) < ids
        before &= low < high
        high = tl.where(before, high, middle)
        low = tl.where(before, middle + 1, low)
        left = left // 2
    return (low < number) & (tl.load(held.ids + low, mask=low < number, other=-1) == ids)


@triton.jit
def within(bounds, centre):
    """Returns the same bounds with another centre."""
    return Bounds(
        bounds.cut, bounds.mass, bounds.guard, bounds.cutoff, bounds.cutoff_guard, bounds.band,
        centre,
    )  # fmt: skip
