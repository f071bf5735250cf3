"""What follows from the logits of listed ids and what all others come to, differentiably.

With z_k the listed logits (-inf: not listed) and o the log-sum-exp of all others, all of float64
and a few numbers a row. Only numbers of one sign are added, so nothing cancels; an id whose others
are all -inf has log-odds of +inf and no gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt._C import OTHERS_MAX

_LARGE = 745.0  # e^-745 is the last number of float64 above 0


class Listed(NamedTuple):
    """The results of the operator that have gradients."""

    own: Tensor  # (N, K)
    others: Tensor  # (N,)
    moments: Tensor  # (N, 2), entropy and sum of squares of the others' distribution

    def set_log_odds(self) -> Tensor:
        """(N,); log-sum-exp of the listed logits less that of the others."""
        inside = self.own[:, 0] if self.own.shape[1] == 1 else _logsumexp(self.own)
        return _difference(inside, self.others)

    def label_log_odds(self) -> Tensor:
        """(N, K); each listed logit less the log-sum-exp of all the rest.

        The rest of the largest is summed without it, that of the others with it, so that it is
        never subtracted.
        """
        if self.own.shape[1] == 1:
            return _difference(self.own[:, 0], self.others)[:, None]
        every = torch.cat([self.own, self.others[:, None]], 1)  # (N, K + 1)
        top, place = every.detach().max(1, keepdim=True)
        e = torch.exp(every - torch.where(top.isfinite(), top, 0.0))
        before = torch.nn.functional.pad(e.cumsum(1)[:, :-1], (1, 0))
        after = torch.nn.functional.pad(e.flip(1).cumsum(1)[:, :-1], (1, 0)).flip(1)
        is_top = torch.zeros_like(e, dtype=torch.bool).scatter_(1, place, True)
        rest = before + after  # at least the top's own 1, unless there is nothing at all
        rest = top + torch.where(is_top | (rest == 0), 1.0, rest).log()
        without = _logsumexp(every.masked_fill(is_top, float("-inf")))[:, None]
        rest = torch.where(is_top, without, rest)[:, :-1]
        return _difference(self.own, rest)

    def logsumexp(self) -> Tensor:
        """(N,); of all logits."""
        return _logsumexp(torch.cat([self.own, self.others[:, None]], 1))

    def entropy(self) -> Tensor:
        """(N,), nats; of all entries, a sum of numbers that are not negative."""
        m = self.set_log_odds()
        inside, outside = _shares(m)
        split = inside * _softplus(-m) + outside * _softplus(m)
        return split + outside * self.moments[:, 0] + inside * self._inside_entropy()

    def sum_of_squares(self) -> Tensor:
        """(N,); of all probabilities."""
        inside, outside = _shares(self.set_log_odds())
        own = self._within().exp().square().sum(1)
        return inside.square() * own + outside.square() * self.moments[:, 1]

    def of_all(self) -> dict[str, Callable[[], Tensor]]:
        """Returns what makes the outputs that are about all entries, by their names."""
        return {
            "entropy": self.entropy,
            "logsumexp": self.logsumexp,
            "sum_of_squares": self.sum_of_squares,
        }

    def _within(self) -> Tensor:
        """(N, K); log-probabilities among the listed."""
        total = _logsumexp(self.own)[:, None]
        return torch.where(total == float("-inf"), float("-inf"), self.own - _finite(total))

    def _inside_entropy(self) -> Tensor | float:
        """(N,); of the listed among themselves."""
        if self.own.shape[1] == 1:
            return 0.0
        logps = self._within()
        return -(logps.exp() * _finite(logps)).sum(1)


def is_largest(own: Tensor, stats: Tensor) -> Tensor:
    """(N,), bool; whether no other logit is larger than the first that is listed."""
    return own.detach()[:, 0] >= stats[:, OTHERS_MAX]


def first_places(ids: Tensor) -> Tensor:
    """(N, K); of each id the first place in its row at which it stands."""
    values, order = ids.sort(dim=1, stable=True)
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = values[:, 1:] != values[:, :-1]
    begin = torch.where(new, places, 0).cummax(1).values  # of each run of equal ids
    return torch.empty_like(ids).scatter_(1, order, order.gather(1, begin))


def _finite(x: Tensor) -> Tensor:
    """Returns 0 for -inf, which has no gradient."""
    return torch.where(x == float("-inf"), 0.0, x)


def _difference(own: Tensor, others: Tensor) -> Tensor:
    """Returns own - others, +inf without a gradient where there are no others."""
    alone = (others == float("-inf")) & ~own.isnan()
    return torch.where(alone, float("inf"), own - torch.where(alone, 0.0, others))


def _logsumexp(x: Tensor) -> Tensor:
    """Returns that over the last dimension, -inf without a gradient where there is nothing."""
    nothing = (x == float("-inf")).all(-1)
    total = torch.logsumexp(torch.where(nothing[..., None], 0.0, x), -1)
    return torch.where(nothing, float("-inf"), total)


def _softplus(m: Tensor) -> Tensor:
    """Returns log(1 + e^m)."""
    return -torch.nn.functional.logsigmoid(-m.clamp(-_LARGE, _LARGE))


def _shares(m: Tensor) -> tuple[Tensor, Tensor]:
    """Returns sigmoid(m) and sigmoid(-m)."""
    m = m.clamp(-_LARGE, _LARGE)
    return m.sigmoid(), (-m).sigmoid()
