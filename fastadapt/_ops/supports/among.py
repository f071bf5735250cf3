"""Log-odds of labels among lists of ids: which pairs of row and id take part, and sums over them.

On a CPU both are loops of C++, where operators of torch would be some sixty, each on a few numbers;
on a GPU they are those operators.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt import _C
from fastadapt._ops.common import no_double_backward
from fastadapt._ops.lists import ends_of, rows_of

_library = torch.library.Library("fastadapt", "FRAGMENT")
_library.define(
    "support_pairs(Tensor labels, Tensor used, Tensor full, Tensor ids, Tensor offsets)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define("support_among(Tensor z, Tensor ends, Tensor own, Tensor without) -> Tensor")
_library.define("support_among_backward(Tensor dm, Tensor z, Tensor ends, Tensor own) -> Tensor")


class Pairs(NamedTuple):
    """The pairs of the rows whose label stands among others of its list; no other costs a product.

    Attributes:
        ids: (count,) int64, row by row, ascending in a row.
        ends: (N + 1,) int64, where each row's pairs begin and the last ones end.
        own: (N,) int64, the place of the label's pair, -1 in all other rows.
        without: (N,) float64, the log-odds of those: -inf where the label is outside of its list,
            +inf where it is alone in it, 0 where it is ignored or the row is full.
    """

    ids: Tensor
    ends: Tensor
    own: Tensor
    without: Tensor

    @property
    def rows(self) -> Tensor:
        """The row of each pair, (count,) int64."""
        return rows_of(self.ends.diff(), self.ids.shape[0])


def pairs_of(labels: Tensor, used: Tensor, full: Tensor, ids: Tensor, offsets: Tensor) -> Pairs:
    """Returns the pairs that take part.

    Args:
        labels: (N,) int64.
        used: (N,) bool, whose labels are not ignored.
        full: (N,) bool, rows without a list.
        ids: (count,) int32, those of the lists.
        offsets: (N + 1,) int64.
    """
    return Pairs(*torch.ops.fastadapt.support_pairs(labels, used, full, ids, offsets))


def log_odds_among(z: Tensor, pairs: Pairs) -> Tensor:
    """Returns the log-odds (N,) of logits (count,), float64: a few numbers for each pair.

    Sums are by ascending ids; others that are all -inf leave +inf without a gradient.
    """
    out: Tensor = torch.ops.fastadapt.support_among(z, pairs.ends, pairs.own, pairs.without)
    return out


def _pairs(
    labels: Tensor, used: Tensor, full: Tensor, ids: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By C++."""
    n = labels.shape[0]
    out = labels.new_empty(ids.shape[0])
    ends, own = labels.new_empty(n + 1), labels.new_empty(n)
    without = labels.new_empty(n, dtype=torch.float64)
    count = _C.pairs_among(
        labels.contiguous(),
        used.contiguous(),
        full.contiguous(),
        ids.contiguous(),
        offsets.contiguous(),
        out,
        ends,
        own,
        without,
        n,
    )
    return out[:count].clone() if count < out.shape[0] else out, ends, own, without


def _pairs_of_torch(
    labels: Tensor, used: Tensor, full: Tensor, ids: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By operators of torch."""
    counts = offsets.diff()
    rows = rows_of(counts, ids.shape[0])
    hit = ids == labels[rows]
    holds = torch.zeros_like(used)
    holds[rows[hit]] = True
    takes = used & holds & (counts > 1)
    some = takes[rows].nonzero()[:, 0]
    ends = ends_of(counts * takes)
    own = torch.full_like(labels, -1)
    own[rows[some][hit[some]]] = hit[some].nonzero()[:, 0]
    without = torch.where(holds, float("inf"), float("-inf")).double()
    return ids[some].long(), ends, own, without.masked_fill(~used | full, 0.0)


def _among(z: Tensor, ends: Tensor, own: Tensor, without: Tensor) -> Tensor:
    """By C++."""
    m = torch.empty_like(without)
    _C.log_odds_among(z.contiguous(), ends, own, without, m, own.shape[0])
    return m


def _among_backward(dm: Tensor, z: Tensor, ends: Tensor, own: Tensor) -> Tensor:
    """By C++."""
    z = z.contiguous()
    dz = torch.empty_like(z)
    _C.log_odds_among_backward(dm.contiguous(), z, ends, own, dz, own.shape[0])
    return dz


class _Others(NamedTuple):
    """Of the rows that take part, by operators of torch."""

    rows: Tensor  # (n,)
    at: Tensor  # of all other pairs
    place: Tensor  # which of the rows each is of
    shares: Tensor  # exp(z - top) of each
    top: Tensor  # (n,)
    mass: Tensor  # (n,)


def _others(z: Tensor, ends: Tensor, own: Tensor) -> _Others:
    """Returns the masses of all pairs but the labels', row by row."""
    takes = own >= 0
    rows = takes.nonzero()[:, 0]
    n = rows.shape[0]
    place = rows_of(ends.diff()[rows], z.shape[0])
    is_own = torch.zeros_like(z, dtype=torch.bool).index_fill(0, own[rows], True)
    at = (~is_own).nonzero()[:, 0]
    others, place = z.index_select(0, at), place.index_select(0, at)
    top = z.new_full((n,), float("-inf")).scatter_reduce(0, place, others, "amax")
    top = top.masked_fill(top == float("-inf"), 0.0)
    # one sum by one thread on a GPU too, where index_add would have atomics
    lengths = place.bincount(minlength=n)
    shares = (others - top[place]).exp()
    mass = torch.segment_reduce(shares, "sum", lengths=lengths, axis=0, unsafe=True)
    return _Others(rows, at, place, shares, top, mass)


def _among_of_torch(z: Tensor, ends: Tensor, own: Tensor, without: Tensor) -> Tensor:
    """By operators of torch."""
    x = _others(z, ends, own)
    mine = z.index_select(0, own[x.rows])
    alone = (x.mass == 0) & ~mine.isnan()
    m = mine - (x.top + x.mass.masked_fill(alone, 1.0).log())
    return without.index_copy(0, x.rows, m.masked_fill(alone, float("inf")))


def _among_backward_of_torch(dm: Tensor, z: Tensor, ends: Tensor, own: Tensor) -> Tensor:
    """By operators of torch."""
    x = _others(z, ends, own)
    g = dm.index_select(0, x.rows).masked_fill(x.mass == 0, 0.0)
    dz = torch.zeros_like(z).index_copy(0, own[x.rows], g)
    of_pairs = g[x.place]
    moved = torch.where(of_pairs == 0, 0.0, -of_pairs * (x.shares / x.mass[x.place]))
    return dz.index_copy(0, x.at, moved)


def _fake_pairs(
    labels: Tensor, used: Tensor, full: Tensor, ids: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the first returns; how many pairs there are depends on the ids."""
    count = torch.library.get_ctx().new_dynamic_size()
    n = labels.shape[0]
    return (
        labels.new_empty(count),
        labels.new_empty(n + 1),
        labels.new_empty(n),
        labels.new_empty(n, dtype=torch.float64),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps the logits and where they are."""
    ctx.save_for_backward(*inputs[:3])


def _gradient(ctx: Any, dm: Tensor) -> tuple[Tensor | None, ...]:
    """That of the logits."""
    return torch.ops.fastadapt.support_among_backward(dm, *ctx.saved_tensors), None, None, None


def _register() -> None:
    """Implementations, fakes and autograd."""
    for name, on_cpu, on_cuda, fake in (
        ("support_pairs", _pairs, _pairs_of_torch, _fake_pairs),
        ("support_among", _among, _among_of_torch, lambda z, ends, own, x: torch.empty_like(x)),
        (
            *("support_among_backward", _among_backward, _among_backward_of_torch),
            lambda dm, z, ends, own: torch.empty_like(z),
        ),
    ):
        _library.impl(name, on_cpu, "CPU")
        _library.impl(name, on_cuda, "CUDA")
        torch.library.register_fake(f"fastadapt::{name}", fake, lib=_library)
    torch.library.register_autograd(
        "fastadapt::support_among", _gradient, setup_context=_save, lib=_library
    )
    torch.library.register_autograd(
        "fastadapt::support_among_backward", no_double_backward("support log-odds"), lib=_library
    )


_register()
