"""Log-odds and entropies on the support of each row, replayed or decided again."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastadapt.adaptor import Adaptor
from fastadapt.linear import linear_log_odds
from fastadapt.losses.support import linear_support_log_odds
from fastadapt.results import Support
from fastadapt.sampling.functions import filter_logits
from fastadapt.trl._log_probs import Head

_NUMBERS = 1 << 22  # of logits, or of a head's rows, that are held at a time


class Replayed:
    """Scores tokens on the supports that they were drawn from, in the order of the rows.

    Args:
        support: of N rows.
        labels: (N,), int64; the tokens.
        trains_entropy: whether the entropies have a gradient.
    """

    def __init__(self, support: Support, labels: Tensor, trains_entropy: bool) -> None:
        self.support, self.labels, self.at = support, labels, 0
        self.trains_entropy = trains_entropy

    def __call__(self, hidden: Tensor, labels: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        """Returns log-odds and entropies of the next rows, (N,) each."""
        return scored_on(hidden, labels, self.of(labels), head, self.trains_entropy)

    def of(self, labels: Tensor) -> Support:
        """Returns the supports of the next rows.

        Raises:
            RuntimeError: other tokens than were drawn, or one that is not in its support.
        """
        first, self.at = self.at, self.at + labels.shape[0]
        if not torch.equal(labels, self.labels[first : self.at]):
            raise RuntimeError("labels: expected the sampled tokens in their order, got others")
        support = self.support[first : self.at]
        if not bool(support.contains(labels).all()):
            token = int(labels[~support.contains(labels)][0])
            raise RuntimeError(f"support: expected each token in its own, got {token} outside")
        return support

    def check_end(self) -> None:
        """Raises unless all rows have been scored.

        Raises:
            RuntimeError: fewer were.
        """
        if self.at != len(self.support):
            raise RuntimeError(f"labels: expected {len(self.support)} to be scored, got {self.at}")


class Decided:
    """Scores tokens on the supports that an adaptor leaves of their own rows' logits.

    A row's own token is kept, so that its log-probability is finite.

    Args:
        adaptor: its filters; the head's scale holds the temperature.
        trains_entropy: whether the entropies have a gradient.
    """

    def __init__(self, adaptor: Adaptor, trains_entropy: bool) -> None:
        self.adaptor, self.trains_entropy = adaptor, trains_entropy
        self._parts: list[Support] = []
        self._removed: list[Tensor] = []

    @property
    def support(self) -> Support:
        """Of all rows so far."""
        return Support.cat(self._parts)

    @property
    def removed(self) -> Tensor:
        """Which tokens the adaptor would not have kept, of all rows so far, (N,) bool."""
        return torch.cat(self._removed)

    def __call__(self, hidden: Tensor, labels: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        """Returns log-odds and entropies of the next rows, (N,) each."""
        support = self.of(hidden, labels, head)
        return scored_on(hidden, labels, support, head, self.trains_entropy)

    @torch.no_grad()
    def of(self, hidden: Tensor, labels: Tensor, head: Head) -> Support:
        """Decides the supports of the next rows."""
        parts: list[Support] = []
        block = max(1, _NUMBERS // head.weight.shape[0])
        for first in range(0, max(1, labels.shape[0]), block):
            own = labels[first : first + block, None]
            x = head.scale * F.linear(hidden[first : first + block], head.weight, head.bias).float()
            x = x if head.softcap is None else head.softcap * (x / head.softcap).tanh()
            mask = filter_logits(x, self.adaptor) > -torch.inf
            self._removed.append(~mask.gather(1, own)[:, 0])
            parts.append(Support.from_mask(mask.scatter(1, own, True)))
        self._parts += parts
        return Support.cat(parts)


def scored_on(
    hidden: Tensor, labels: Tensor, support: Support, head: Head, trains_entropy: bool
) -> tuple[Tensor, Tensor]:
    """Returns the labels' log-odds and the entropy on the support of each row.

    Rows that are full are those of `linear_log_odds`.

    Args:
        hidden: (N, H).
        labels: (N,), int64.
        support: of N rows.
        head: of V ids.
        trains_entropy: whether the entropy has a gradient.

    Returns:
        float32, (N,) each, nats.
    """
    full = support.full
    if bool(full.all()):
        return _on_all(hidden, labels, head, trains_entropy)
    if not bool(full.any()):
        return _on_some(hidden, labels, support, head, trains_entropy)
    whole, part = full.nonzero()[:, 0], (~full).nonzero()[:, 0]
    on_all = _on_all(hidden[whole], labels[whole], head, trains_entropy)
    on_some = _on_some(hidden[part], labels[part], support.index(part), head, trains_entropy)
    order = torch.cat([whole, part]).argsort()
    log_odds, entropy = (
        torch.cat(both).index_select(0, order) for both in zip(on_all, on_some, strict=True)
    )
    return log_odds, entropy


def _on_all(
    hidden: Tensor, labels: Tensor, head: Head, trains_entropy: bool
) -> tuple[Tensor, Tensor]:
    """Returns log-odds and entropy against the whole vocabulary."""
    log_odds, entropy = linear_log_odds(
        hidden,
        head.weight,
        labels,
        head.bias,
        softcap=head.softcap,
        logit_scale=head.scale,
        outputs=("entropy",),
        differentiable=trains_entropy,
    )
    return log_odds, entropy


def _on_some(
    hidden: Tensor, labels: Tensor, support: Support, head: Head, trains_entropy: bool
) -> tuple[Tensor, Tensor]:
    """Returns log-odds and entropy against the ids of each row."""
    log_odds = linear_support_log_odds(
        hidden,
        head.weight,
        labels,
        support,
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.scale,
    )
    with contextlib.nullcontext() if trains_entropy else torch.no_grad():
        return log_odds, _entropy(hidden, support, head).to(log_odds.dtype)


def _entropy(hidden: Tensor, support: Support, head: Head) -> Tensor:
    """Returns the entropy of each row's softmax over its ids, (N,), 0 where there are none.

    With z' = z less the row's largest and S = sum exp z', it is log S - sum(exp(z') z') / S.
    """
    rows, ids = support.rows, support.ids.long()
    n, block = len(support), max(1, _NUMBERS // hidden.shape[1])
    parts = [
        # the rows of a head are made again in the backward, and never all at once
        checkpoint(_products, hidden, head, pairs[0], pairs[1], use_reentrant=False)
        for pairs in zip(rows.split(block), ids.split(block), strict=True)
    ]
    z = torch.cat(parts)
    top = z.new_full((n,), -torch.inf).scatter_reduce(0, rows, z.detach(), "amax")
    z = z - top[rows]
    mass, mean = (z.new_zeros(n).index_add(0, rows, x) for x in (z.exp(), z.exp() * z))
    mass = mass.masked_fill(support.counts == 0, 1.0)
    return mass.log() - mean / mass


def _products(hidden: Tensor, head: Head, rows: Tensor, ids: Tensor) -> Tensor:
    """Returns the logits of pairs of a row and an id, (count,), float32 or float64."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    x = (hidden[rows].to(wide) * head.weight[ids].to(wide)).sum(-1)
    x = head.scale * (x if head.bias is None else x + head.bias[ids].to(wide))
    return x if head.softcap is None else head.softcap * (x / head.softcap).tanh()
