"""The cut of a filter beyond the tokens that ranks have sent: a search over keys.

Ranks add up what survives from 64 pivots on, again and again, until few tokens are between two of
them; these are sent.
"""

from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt._ops.sharded.arithmetic import (
    LAST_ID,
    LOWEST,
    from_ordered,
    ordered,
    with_ties,
)
from fastadapt._ops.sharded.exchange import Program, Request, packed, unpacked
from fastadapt._ops.sharded.slice import Slice
from fastadapt._ops.sharded.support import COUNT, MASS, Support, Tokens

PIVOTS = 64
MOST_SENT = 256  # tokens by a rank, at the end of a search
FAR = 30.0  # nats below the best, where no token has mass
ONE, ALL_TIES = 1, 1 << 31  # a token, a value: what a cut may part


class Search(NamedTuple):
    """Searches of p problems: the largest key from which on a weight reaches a target.

    Attributes:
        support: of the problems.
        kind: of the keys, "rank" or "typicality".
        weight: COUNT or MASS.
        target: (p,) int64, which all survivors reach.
        end: (p,) int64, a key from which on they do not.
        above: (p, 3), the sums from there on.
        total: (p, 3), those of all.
        unit: ONE, or ALL_TIES where tokens of one value stay together.
    """

    support: Support
    kind: str
    weight: int
    target: Tensor
    end: Tensor
    above: Tensor
    total: Tensor
    unit: int


class Found(NamedTuple):
    """Cuts of p problems.

    Attributes:
        cut: (p,) int64, the key.
        sums: (p, 3), of survivors from it on...
        before: (p, 3), ...and of those above it.
        by_rank: (p, ranks), the mass of each rank from the cut on.
    """

    cut: Tensor
    sums: Tensor
    before: Tensor
    by_rank: Tensor


class Window(NamedTuple):
    """Where the cuts of some of the problems are: low < high are not neighbours."""

    support: Support
    low: Tensor
    high: Tensor


def search(part: Slice, task: Search) -> Program[Found]:
    """Finds the cuts."""
    low = torch.full_like(task.end, LOWEST)
    high, above, at_low = task.end, task.above, task.total
    if task.unit == ALL_TIES:
        high = with_ties(high + task.unit - 1)
    for turn in count():  # a dozen at most
        inside = at_low[:, COUNT] - above[:, COUNT]
        index = ((inside > MOST_SENT) & (high - low > task.unit)).nonzero()[:, 0]
        if len(index) == 0:
            break
        some = task.support.at(index)
        pivots = _pivots(part, task, Window(some, low[index], high[index]), turn)
        sums = yield Request("sum", part.tally_above(some, task.kind, pivots))
        reached = (sums[..., task.weight] >= task.target[index, None]).sum(1)  # the first ones do
        ends = torch.cat([low[index, None], pivots, high[index, None]], 1)
        known = torch.cat([at_low[index, None], sums, above[index, None]], 1)
        place = torch.arange(len(index), device=low.device)
        low, high, at_low, above = (x.clone() for x in (low, high, at_low, above))
        low[index], high[index] = ends[place, reached], ends[place, reached + 1]
        at_low[index], above[index] = known[place, reached], known[place, reached + 1]
    return (yield from _ended(part, task, low, high, at_low, above))


def _pivots(part: Slice, task: Search, window: Window, turn: int) -> Tensor:
    """64 keys inside a window, ascending: evenly spaced by value, then by float, by id at last."""
    low, high, support = window.low, window.high, window.support
    step = torch.arange(PIVOTS, device=low.device)
    one_value = low >> 31 == (high - 1) >> 31
    if turn < 2:
        best = support.m if task.kind == "rank" else torch.zeros_like(support.m)
        bottom = torch.maximum(from_ordered(low >> 31), best - FAR)
        width = (from_ordered(high >> 31) - bottom).clamp(min=0)
        values = bottom[:, None] + width[:, None] * (step / PIVOTS)
        keys = ordered(values) << 31
    else:  # which always ends
        low_value, values = low >> 31, (high - 1 >> 31) - (low >> 31)
        keys = low_value[:, None] + (values[:, None] * (step + 1) + PIVOTS) // (PIVOTS + 1) << 31
    if task.unit == ONE:
        first = torch.maximum(low, (low >> 31 << 31) + LAST_ID - part.whole + 1)
        last = torch.minimum(high, (low >> 31 << 31) + LAST_ID + 1)
        ids = first[:, None] + (last - first)[:, None] * (step + 1) // (PIVOTS + 1)
        keys = torch.where(one_value[:, None], ids, keys)
    return keys.clamp((low + task.unit)[:, None], (high - task.unit)[:, None])


def _ended(
    part: Slice, task: Search, low: Tensor, high: Tensor, at_low: Tensor, above: Tensor
) -> Program[Found]:
    """Sends the tokens between two keys, or takes them as one where they are of one value."""
    inside = at_low[:, COUNT] - above[:, COUNT]
    one = inside > MOST_SENT  # of one value
    few = torch.where(one, 0, inside)
    most = max(int(few.max()), 1)
    own = part.tally_above(task.support, task.kind, torch.stack([low, high], 1))[..., MASS]
    mine = (own, *part.best_below(task.support, task.kind, high, most))
    words = yield Request("gather", packed(*mine))
    own, x, ids = unpacked(words, *mine)  # (ranks, p, 2), (ranks, p, count) twice
    tokens = Tokens.of(task.support, *(t.transpose(0, 1).flatten(1) for t in (x, ids.long())))
    key = torch.where(tokens.ids >= 0, tokens.key(task.kind), 2 * LOWEST)
    there = (key >= low[:, None]) & ~one[:, None]
    order = torch.where(there, key, 2 * LOWEST).argsort(1, descending=True)
    weights = tokens.w if task.weight == MASS else torch.ones_like(tokens.w)
    running = above[:, task.weight, None] + (weights * there).gather(1, order).cumsum(1)
    first = (running < task.target[:, None]).sum(1, keepdim=True).clamp(max=key.shape[1] - 1)
    cut = key.gather(1, order).gather(1, first)[:, 0]
    cut = torch.where(one, low, with_ties(cut) if task.unit == ALL_TIES else cut)

    def from_on(key_: Tensor) -> Tensor:
        chosen = there & (key >= key_[:, None])
        return above + torch.stack(
            [chosen.sum(1), (tokens.w * chosen).sum(1), (tokens.u * chosen).sum(1)], 1
        )

    sums = torch.where(one[:, None], at_low, from_on(cut))
    before = torch.where(one[:, None], above, from_on(cut + task.unit))
    of_rank = (tokens.w * (there & (key >= cut[:, None]))).view(len(cut), len(own), -1).sum(2)
    by_rank = torch.where(one[:, None], own[..., 0].T, own[..., 1].T + of_rank)
    return Found(cut, sums, before, by_rank)
