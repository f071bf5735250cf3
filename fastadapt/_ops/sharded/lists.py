"""The second round: the best tokens of every slice and what its tokens come to."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt._ops.sharded.arithmetic import (
    LOWEST,
    NEARLY,
    UNIT,
    from_ordered,
    key_of,
)
from fastadapt._ops.sharded.exchange import Program, Request, packed, unpacked
from fastadapt._ops.sharded.opening import Opened
from fastadapt._ops.sharded.state import State
from fastadapt._ops.sharded.support import CUTS, NEUTRAL, SENT, Support, Tokens, above


class Law(NamedTuple):
    """An adaptor: its knobs by name, (N,) float64 each, and its filters in their order.

    Attributes:
        knobs: the temperature among them.
        filters: their names.
        greedy: (N,) bool, rows of temperature 0.
        inverse: (N,) float32, 1 / T.
        first: the first filter that acts in some row.
    """

    knobs: Mapping[str, Tensor]
    filters: tuple[str, ...]
    greedy: Tensor
    inverse: Tensor
    first: str | None

    @classmethod
    def of(cls, knobs: Mapping[str, Tensor], filters: tuple[str, ...]) -> "Law":
        """Fills in what follows from knobs and filters."""
        t = knobs["temperature"]
        greedy = t == 0
        acting = (name for name in filters if bool((knobs[name] != NEUTRAL[name]).any()))
        inverse = 1 / torch.where(greedy, 1.0, t).float()
        return cls(knobs, filters, greedy, inverse, next(acting, None))

    @property
    def by_maximum(self) -> bool:
        """Whether min-p comes first, whose test is known from the largest logit on."""
        return self.first == "min_p" and bool((self.knobs["min_tokens_to_keep"] == 1).all())

    @property
    def rest(self) -> tuple[str, ...]:
        """The filters that `support` leaves to be run."""
        return self.filters[self.filters.index("min_p") + 1 :] if self.by_maximum else self.filters

    @property
    def tokens_sent(self) -> int:
        """How many tokens a rank sends of each row: one for the argmax, or what filters need."""
        first = self.first
        if first is None:
            return 1
        top_k = self.knobs["top_k"]
        if first == "top_k" and bool((top_k > 0).all()):
            k = torch.maximum(top_k, self.knobs["min_tokens_to_keep"]).max()
            return min(SENT, int(k.clamp(max=SENT)) + 1)  # one more says where ties end
        return SENT

    def support(self, x_max: Tensor, active: Tensor) -> Support:
        """The support before any sum is known: all finite tokens, or what min-p leaves of them."""
        whole = Support.whole(
            torch.arange(len(x_max), device=x_max.device),
            self.inverse,
            x_max * self.inverse + 0.0,  # +0 of the two zeros
        )
        if not self.by_maximum:
            return whole
        min_p = self.knobs["min_p"]
        acting = active & (min_p != NEUTRAL["min_p"])
        least = (min_p.float().double() * UNIT * NEARLY).ceil().long()
        guard = key_of(whole.m, torch.zeros_like(least))  # none but the best is above
        at = CUTS.index("min_p")
        whole.least[:, at] = torch.where(acting, least, 0)
        whole.guard[:, at] = torch.where(acting, guard, LOWEST)
        return whole


class Lists(NamedTuple):
    """The best tokens of all slices, by logit and id.

    Attributes:
        x: (N, L) float32.
        ids: (N, L) int64, -1 behind the last.
        cover: (N,) int64, the key of (logit, id) from which on all finite tokens are listed.
    """

    x: Tensor
    ids: Tensor
    cover: Tensor

    @property
    def key(self) -> Tensor:
        """(N, L), by logit and id."""
        return torch.where(self.ids >= 0, key_of(self.x, self.ids), 2 * LOWEST)

    def state(self, whole: Opened, support: Support, counts: Tensor) -> State:
        """The state of problems (P,) of these rows, from the sums of each rank (ranks, P, 3)."""
        tokens = Tokens.of(support, self.x[support.row], self.ids[support.row])
        cover = self.cover[support.row]
        scaled = from_ordered(cover >> 31) * support.inverse
        # scaling may make logits equal, so that of the last one ties may be missing
        scaled = above(key_of(scaled, torch.zeros_like(cover)))
        same = (support.inverse == 1) | (cover == LOWEST)
        return State(whole.part, support, tokens, torch.where(same, cover, scaled), counts)


def listed(
    whole: Opened, count: int, supports: list[Support], others: list[Tensor]
) -> Program[tuple[Lists, list[Tensor], list[Tensor]]]:
    """Exchanges the best `count` tokens of each row, the sums of supports, and other tensors.

    Returns:
        Lists, list, list: of tokens; of sums (ranks, P, 3) of each support; of others (ranks, ...).
    """
    distinct: list[Support] = []
    places = []
    for support in supports:  # those that are equal are summed up once
        same = (i for i, other in enumerate(distinct) if _equal(support, other))
        place = next(same, len(distinct))
        places.append(place)
        distinct += [support] * (place == len(distinct))
    mine = [*whole.part.best(count), *map(whole.part.tally, distinct), *others]
    words = yield Request("gather", packed(*mine))
    x, ids, *rest = unpacked(words, *mine)
    sums, others = rest[: len(distinct)], rest[len(distinct) :]
    return _merged(x, ids.long()), [sums[place] for place in places], others


def _equal(one: Support, other: Support) -> bool:
    """Whether supports are the same tests."""
    return one is other or all(map(torch.equal, one, other))


def _merged(x: Tensor, ids: Tensor) -> Lists:
    """One list a row out of those of ranks (ranks, N, L)."""
    key = torch.where(ids >= 0, key_of(x, ids), 2 * LOWEST)
    last = key[..., -1]  # a list that is not full, or ends in -inf, has all finite tokens
    cover = torch.where(last >= LOWEST, last, LOWEST).amax(0)
    order = _by_row(key).argsort(1, descending=True)
    return Lists(_by_row(x).gather(1, order), _by_row(ids).gather(1, order), cover)


def _by_row(x: Tensor) -> Tensor:
    """(ranks, N, L) as (N, ranks L)."""
    return x.transpose(0, 1).flatten(1)
