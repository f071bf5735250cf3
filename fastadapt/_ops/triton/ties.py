"""A level: equal tokens at the floor of a list, or all of a bracket, which are one entry.

Rows may have more tokens of one value than a list has room for, as flat rows have. All programs of
the row count them by block, where they would list them; the list holds what is above. Which of
them is the n-th by id the counts tell, with a look at one block.
"""

import triton
import triton.language as tl

from fastadapt._ops.triton.arithmetic import LAST_ID, keys, masses, ranks, survives
from fastadapt._ops.triton.rows import load_scaled


@triton.jit
def is_level(parts, largest, inverse, sizes):
    """Whether most super-groups have the largest scaled logit of a row."""
    j = tl.arange(0, sizes.SPLITS * sizes.PER_TILE)
    number = parts.splits * sizes.PER_TILE
    own = tl.load(parts.supers + j, mask=j < number, other=float("-inf")) * inverse
    return 2 * tl.sum((own == largest).to(tl.int32), 0) > number


@triton.jit
def count_tile(count, weights, row, tile, floor, sizes):
    """Counts the tokens of a tile at the floor by block; returns bits and numbers of those above.

    Of each group there is a bit for each logit.
    """
    COLUMNS: tl.constexpr = sizes.COLUMNS
    BY_BLOCK: tl.constexpr = sizes.BLOCK // sizes.COLUMNS  # logits of a group
    ids = tile * (COLUMNS * sizes.GROUP) + tl.arange(0, COLUMNS)
    bits, number = tl.zeros([COLUMNS], tl.int32), tl.zeros([COLUMNS], tl.int32)
    many = tl.full([], 0, tl.int32)
    for r in range(0, sizes.GROUP, BY_BLOCK):
        equal = tl.zeros([COLUMNS], tl.int32)
        for i in tl.static_range(BY_BLOCK):
            s = load_scaled(row, ids + (r + i) * COLUMNS)
            above = (s > floor).to(tl.int32)
            bits |= above << (r + i)
            number += above
            equal += (s == floor).to(tl.int32)
        block = tile * (sizes.GROUP // BY_BLOCK) + r // BY_BLOCK
        here = tl.sum(equal, 0)
        tl.store(weights.tied + block, here, mask=block < weights.blocks)
        many += here
    tl.atomic_add(count, many.to(tl.int64), mask=many > 0, sem="relaxed")
    return bits, number


@triton.jit
def cut_in_level(row, weights, level, n, sizes):
    """Returns the rank of the n-th token of a level, by id, or one above all of them."""
    j = tl.arange(0, sizes.BLOCKS)
    count = tl.load(weights.tied + j, mask=j < weights.blocks, other=0)
    block = tl.sum((tl.cumsum(count, 0) < tl.maximum(n, 1)).to(tl.int32), 0)
    left = tl.maximum(n, 1) - tl.sum(tl.where(j < block, count, 0), 0)
    ids = block * sizes.BLOCK + tl.arange(0, sizes.BLOCK)
    hit = load_scaled(row, ids) == level
    found = hit & (tl.cumsum(hit.to(tl.int32), 0) == left)
    return ranks(keys(level), tl.min(tl.where(found, ids, LAST_ID), 0)) + (n == 0).to(tl.int64)


@triton.jit
def has_level(held, sizes):
    """Whether a level is an entry of what a program holds, a list or a bracket."""
    return (held.tied > 0) & (held.number <= sizes.LIST)


@triton.jit
def kept_of_level(row, bounds, s, ids, level, tied, target, above):
    """Says how many tokens of a level top-p keeps, where a list's are less than the target.

    A given mass is above all of them.

    Returns their number, the mass before the last of them, and the mass of one.
    """
    before = above + tl.sum(tl.where(survives(s, ids, row.m, bounds), masses(s - row.m), 0), 0)
    mass = masses(level - row.m)
    number = (target - before + mass - 1) // tl.maximum(mass, 1)
    number = tl.minimum(number, tied).to(tl.int32)
    return number, before + (number - 1) * mass, mass


@triton.jit
def store_level(row, bounds, weights, level, tied, above, sizes):
    """Makes the masses of blocks those of the first tokens of a level, if they survive.

    Where masses are above it, they are added to these. Returns the number of tokens.
    """
    alive = survives(level, tied * 0, row.m, bounds)
    mass = tl.where(alive, masses(level - row.m), 0)
    j = tl.arange(0, sizes.BLOCKS)
    count = tl.load(weights.tied + j, mask=j < weights.blocks, other=0)
    kept = tl.minimum(tl.maximum(tied - tl.cumsum(count, 0) + count, 0), count)
    there = j < tl.where(above, weights.blocks, 0)
    before = tl.load(weights.kept_sums + j, mask=there, other=0)
    tl.store(weights.kept_sums + j, before + kept * mass, mask=j < weights.blocks)
    return tl.where(alive, tied, 0)


@triton.jit
def add_list(row, bounds, s, ids, sums, sizes):
    """Adds the masses of a list's survivors to those of blocks; returns which survive."""
    alive = survives(s, ids, row.m, bounds)
    tl.atomic_add(sums + ids // sizes.BLOCK, masses(s - row.m), mask=alive, sem="relaxed")
    return alive
