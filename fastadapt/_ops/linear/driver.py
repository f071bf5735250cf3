"""Forward and backward of a linear head, tile by tile of its vocabulary, on any device.

Of each row some ids are listed, its labels. The forward returns their logits and what all other
logits come to: their log-sum-exp, and the entropy and the sum of squares of their distribution q.
Nothing is ever subtracted from a sum, so that what follows from these has all digits.

`plan` says what the backward will want: nothing (0), gradients of the head too (1), or those of the
hidden states alone (2, the frozen head, whose forward makes the Jacobian row of `others`, the sum
of q_j W_j, or of one label's log-odds, W_y - sum of q_j W_j). With 1M = one product of N H V: 1M
forward, and backward 3M (plan 1; 2M for the tiles whose logits were kept), or with plan 2 2M
forward and no product backward.

An adapter's product of r columns, low-rank states times a weight of their own, is added to each
tile's. Its gradients, Jacobian rows included, are those of further columns of states and weight.

With a group every rank has a slice of the vocabulary and the same rows. The statistics of the rows
are exchanged once in the forward; the frozen head's Jacobian rows, or else the gradient of the
hidden states, are summed over the ranks in the dtype of the sums, and so are an adapter's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt._C import (
    NUM_TILE_STATS,
    OTHERS_MAX,
    OTHERS_REST,
    OTHERS_SQUARED,
    OTHERS_SUM,
    OTHERS_WEIGHTED,
)
from fastadapt._ops.linear.gradients import HeadGradients, Quintuple
from fastadapt._ops.linear.tiles import (
    Gains,
    Head,
    Problem,
    RowWork,
    TileRequest,
    label_blocks,
)
from fastadapt._ops.linear.vocab_parallel import merge_stats, sum_over_ranks

FORWARD_ONLY, RECOMPUTE, FROZEN_HEAD = 0, 1, 2  # plans


class Forward(NamedTuple):
    """What the forward returns; 0 in rows that are ignored."""

    own: Tensor  # (N, K) float64, the labels' logits; -inf where one is ignored
    others: Tensor  # (N,) float64, the log-sum-exp of all other logits; -inf where there are none
    moments: Tensor  # (N, 2) float64: entropy of the others' distribution, sum of its squares
    stats: Tensor  # (N, NUM_TILE_STATS) float64
    kept: Tensor  # Jacobian rows (as `jacobian_rows` takes them apart), logits or nothing


class Asked(NamedTuple):
    """What the forward is asked for."""

    plan: int
    kept_bytes: int  # of logits
    moments: bool  # whether the moments are made; else they are 0
    apart: bool  # whether own and others have gradients of their own, not g and -g of one label


class Upstream(NamedTuple):
    """The gradients of the forward's results."""

    own: Tensor
    others: Tensor
    moments: Tensor | None


def kept_ids(n: int, v: int, itemsize: int, tile: int, kept_bytes: int) -> int:
    """Returns how many ids (whole tiles) keep their logits for the backward."""
    if n == 0 or n * v * itemsize <= kept_bytes:
        return v
    return kept_bytes // (n * tile * itemsize) * tile


def empty_outputs(problem: Problem, tile: int, asked: Asked) -> Forward:
    """Allocates the results."""
    hidden, (n, h, r) = problem.hidden, problem.sizes
    v, wide = problem.weight.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    if asked.plan == FROZEN_HEAD:
        kept = hidden.new_empty((n, h) if r == 0 else n * (h + r), dtype=wide)
    else:
        ids = 0
        if asked.plan == RECOMPUTE:
            ids = kept_ids(n, v, hidden.element_size(), tile, asked.kept_bytes)
        kept = hidden.new_empty(n * ids)
    shapes = problem.labels.shape, (n,), (n, 2), (n, NUM_TILE_STATS)
    few = [hidden.new_empty(shape, dtype=torch.float64) for shape in shapes]
    return Forward(few[0], few[1], few[2], few[3], kept)


def jacobian_rows(kept: Tensor, n: int, h: int, r: int) -> list[Tensor]:
    """Returns a frozen head's (N, H) rows and, where there is an adapter, its (N, r) ones."""
    return [kept] if r == 0 else [kept[: n * h].view(n, h), kept[n * h :].view(n, r)]


def _kept_tile(
    kept: Tensor, rows: int, tile: int, n_kept: int, first: int, last: int
) -> Tensor | None:
    """Returns the part of the kept logits that holds a tile, (rows, last - first), or None."""
    if last > n_kept:
        return None
    begin = first // tile * tile
    end = min(begin + tile, n_kept)
    whole = kept[rows * begin : rows * end].view(rows, end - begin)
    return whole[:, first - begin : last - begin]


def forward(work: type[RowWork], problem: Problem, asked: Asked) -> Forward:
    """Computes the results with one product per tile, two with a frozen head."""
    hidden, weight = problem.hidden, problem.weight
    out = empty_outputs(problem, work.tile, asked)
    head = Head.from_problem(problem, problem.used)
    row_work = work(head)
    n = head.hidden.shape[0]
    stats = out.stats.new_zeros(n, NUM_TILE_STATS)
    stats[:, OTHERS_MAX] = float("-inf")
    products = row_work.label_products()
    if head.bias is not None and weight.shape[0] > 0:
        products += head.bias[head.label_rows]
    own = torch.where(head.has_label, head.mapped(products), 0.0)
    frozen = asked.plan == FROZEN_HEAD
    rows = jacobian_rows(out.kept, *problem.sizes) if frozen else []
    sums = [x[:n].zero_() for x in rows]
    n_kept = 0 if frozen else out.kept.shape[0] // max(1, hidden.shape[0])  # ids that are kept
    for first, last in head.tiles(work.tile):
        slot = None if frozen else _kept_tile(out.kept, n, work.tile, n_kept, first, last)
        row_work.sum_tile(first, last, stats, TileRequest(asked.moments, slot, *sums))
    top, found = stats[:, OTHERS_MAX], head.has_label
    if problem.group is not None:
        for x, everywhere in ((stats, out.stats), (own, out.own)):
            head.scatter(x, everywhere)
        has = out.own.new_zeros(out.own.shape, dtype=torch.bool)
        head.scatter(found, has)
        merged, all_own, owned = merge_stats(out.stats, out.own, has, problem.labels, problem.group)
        top = top.clone()
        stats.copy_(head.gather(merged))
        own, found = head.gather(all_own), head.gather(owned)
    missing = head.listed & ~found  # a label that is no id: its row has no gradient
    own = torch.where(head.listed, own.masked_fill(missing, float("nan")), float("-inf"))
    stats[:, OTHERS_SUM].masked_fill_(missing.any(1), 0.0)
    mass = stats[:, OTHERS_SUM]
    alone = mass == 0
    if frozen:
        if problem.group is not None:
            mass = mass * _rescaled(stats[:, OTHERS_MAX], top)
        factor = torch.where(alone, 0.0, problem.logit_scale / mass)
        mine = head.has_label & ~alone[:, None]
        gain = torch.where(mine, head.slope(own), 0.0)
        for total, source in zip(sums, head.weights, strict=True):
            if asked.apart:
                total.mul_(factor[:, None].to(total.dtype))
            elif weight.shape[0] > 0:
                _add_label_rows(work, total, head, source, gain, -factor)
            if problem.group is not None:
                total.copy_(sum_over_ranks(total, problem.group))
    mass = stats[:, OTHERS_SUM]
    log_mass = mass.log()
    parts = [own, torch.where(alone, float("-inf"), stats[:, OTHERS_MAX] + log_mass)]
    parts.append(_moments(stats) if asked.moments else stats.new_zeros(n, 2))
    for x, everywhere in zip((*parts, stats), out, strict=False):
        head.scatter(x, everywhere)
    return out


def _moments(stats: Tensor) -> Tensor:
    """Returns entropy and sum of squares of the others' distribution, 0 where there are none.

    The entropy is a sum of numbers that are not negative, the logarithm of the mass made of what
    lies below the largest, which 1 + rest would lose.
    """
    mass, rest = stats[:, OTHERS_SUM], stats[:, OTHERS_REST]
    largest = (mass - rest).round().clamp(min=1)  # how many are as large as the largest
    log_mass = largest.log() + (rest / largest).log1p()
    entropy = log_mass - stats[:, OTHERS_WEIGHTED] / mass
    both = torch.stack([entropy, stats[:, OTHERS_SQUARED] / mass.square()], 1)
    return torch.where(mass[:, None] == 0, 0.0, both)


def _gains(upstream: Upstream, stats: Tensor) -> Gains:
    """Returns what the gradient of the other logits is made of, 0 where nothing comes from above.

    d others / dz_j = q_j; d entropy / dz_j = -q_j (d_j - the mean of d under q);
    d squares / dz_j = 2 q_j (q_j - squares).
    """
    mass, by = stats[:, OTHERS_SUM], upstream.others
    nothing = upstream.others == 0
    b = c = torch.zeros_like(mass)
    if upstream.moments is not None:
        by_entropy, by_squares = upstream.moments.unbind(1)
        mean, squares = stats[:, OTHERS_WEIGHTED] / mass, stats[:, OTHERS_SQUARED] / mass.square()
        by = by + by_entropy * mean - 2 * by_squares * squares
        b, c = -by_entropy / mass, 2 * by_squares / mass.square()
        nothing = nothing & (upstream.moments == 0).all(1)
    abc = torch.stack([by / mass, b, c], 1)
    none = (nothing | (mass == 0))[:, None]  # 0 times what may be NaN
    return Gains(torch.where(none, 0.0, abc), upstream.moments is not None)


def _rescaled(top: Tensor, before: Tensor) -> Tensor:
    """Returns e^(top - before), +inf where `before` is -inf."""
    return torch.where(before == float("-inf"), float("inf"), (top - before).exp())


def backward(
    work: type[RowWork],
    problem: Problem,
    upstream: Upstream,
    own: Tensor,
    stats: Tensor,
    kept: Tensor,
    wanted: list[bool],
    totals: Quintuple | None = None,
) -> Quintuple:
    """Computes the gradients, and an adapter's; each block of the head's is written once.

    With `totals` those of weights and bias are added there, as `HeadGradients` says.

    Rows without an upstream gradient are dropped like those ignored; not with a group, whose ranks
    must agree on the rows.
    """
    hidden, weight, used = problem.hidden, problem.weight, problem.used
    gains = _gains(upstream, stats)
    takes = used
    if problem.group is None:
        takes = used & ((gains.abc != 0).any(1) | (upstream.own != 0).any(1))
    head = Head.from_problem(problem, takes)
    gains = Gains(head.gather(gains.abc).contiguous(), gains.moments)
    by_own, stats = head.gather(upstream.own), head.gather(stats)
    label_gains = torch.where(head.has_label, by_own * head.slope(head.gather(own)), 0.0)
    label_gains = label_gains.masked_fill(by_own == 0, 0.0)  # 0 times what may be NaN
    row_work = work(head)
    n = head.hidden.shape[0]
    n_kept = kept.shape[0] // max(1, hidden.shape[0])
    before, among = _rows_of_forward(head, used, n) if n_kept else (n, None)
    gradients = HeadGradients(row_work, hidden, weight, problem.bias, wanted, totals, problem.low)
    for first, last, out in gradients.tiles(row_work.backward_tile()):
        slot = _kept_tile(kept, before, work.tile, n_kept, first, last)
        if slot is not None and among is not None:
            slot = slot.index_select(0, among)
        row_work.gradient_tile(first, last, stats, gains, slot, out)
        gradients.add(first, last, out, label_gains)
    sums = [gradients.sums, gradients.low_sums][: len(head.weights)]
    for total, source in list(zip(sums, head.weights, strict=True))[not wanted[0] :]:
        if weight.shape[0] > 0:  # the labels' share, in float32
            _add_label_rows(work, total, head, source, label_gains)
        if problem.group is not None:
            total.copy_(sum_over_ranks(total, problem.group))
    return gradients.finished()


def _add_label_rows(
    work: type[RowWork],
    sums: Tensor,
    head: Head,
    weight: Tensor,
    gain: Tensor,
    factor: Tensor | None = None,
) -> None:
    """Computes sums[r] = factor[r] sums[r] + the sum over K of gain[r] weight[label[r]].

    The weight is the head's own or its adapter's, which is as wide as the sums.
    """
    dtype = head.hidden.dtype if weight is head.weight else weight.dtype
    for rows, source, index in label_blocks(weight, head.label_rows, dtype):
        some = None if factor is None else factor[rows]
        work.add_rows(sums[rows], source, index, gain[rows], some)


def _rows_of_forward(head: Head, used: Tensor, n: int) -> tuple[int, Tensor | None]:
    """Returns the number of rows in the forward, and those that take part (None: all)."""
    if head.places is None:  # none is dropped: no need to wait for a sum
        return n, None
    before = int(used.sum())
    if before == n:
        return n, None
    return before, (used.cumsum(0) - 1).index_select(0, head.places)


def frozen_head_backward(
    work: type[RowWork],
    problem: Problem,
    upstream: Upstream,
    own: Tensor,
    stats: Tensor,
    rows: Tensor,
    apart: bool,
) -> Tensor:
    """Returns dL/dhidden from the stored Jacobian rows, without a product.

    Args:
        work: of the device.
        problem: of its hidden states dtype and length are read; of its weight, where `apart`, the
            labels' rows, else nothing.
        upstream: gradients; unless `apart` those of `others` are those of the label, negated.
        own: (N, K) float64, of the forward.
        stats: of the forward.
        rows: (N, H), of the forward: those of the rows that take part come first.
        apart: as the forward was asked.
    """
    head = Head.from_problem(problem, problem.used)
    by = upstream.others if apart else upstream.own[:, 0]
    by = by.masked_fill(stats[:, OTHERS_SUM] == 0, 0.0)
    nothing = (by == 0)[:, None]
    by = head.gather(by).contiguous()
    rows = rows[: by.shape[0]]
    out = rows.new_zeros(stats.shape[0], rows.shape[1], dtype=problem.hidden.dtype)
    if not apart:
        work.scatter(rows, by, head.places, out)
        return out.masked_fill_(nothing, 0.0)  # 0 times what may be NaN
    sums = rows * by[:, None].to(rows.dtype)
    sums.masked_fill_(head.gather(nothing), 0.0)
    by_own = head.gather(upstream.own)
    gains = torch.where(head.has_label, by_own * head.slope(head.gather(own)), 0.0)
    gains = gains.masked_fill(by_own == 0, 0.0)
    shares = sums if problem.group is None else torch.zeros_like(sums)
    if problem.weight.shape[0] > 0:
        _add_label_rows(work, shares, head, head.weight, gains)
    if problem.group is not None:
        sums += sum_over_ranks(shares, problem.group)
    work.scatter(sums, None, head.places, out)
    return out
