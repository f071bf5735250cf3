"""Forward and backward of a linear head, tile by tile of its vocabulary, on any device.

`plan` says what the backward will want: nothing (0), gradients of the head too (1), or those of the
hidden states alone (2, the frozen head, whose forward makes the Jacobian row
W_y - sum of q_j W_j). With 1M = one product of N H V: 1M forward, and backward 3M (plan 1; 2M for
the tiles whose logits were kept), or with plan 2 2M forward and no product backward.

With a group every rank has a slice of the vocabulary and the same rows. The statistics of the rows
are exchanged once in the forward; the frozen head's Jacobian rows, or else the gradient of the
hidden states, are summed over the ranks in the dtype of the sums.
"""

import torch
from torch import Tensor

from fastadapt._C import LABEL_LOGIT, NUM_STATS, OTHERS_MAX, OTHERS_SUM
from fastadapt._ops.linear.tiles import Head, Problem, RowWork, TileRequest
from fastadapt._ops.linear.vocab_parallel import merge_stats, sum_over_ranks

FORWARD_ONLY, RECOMPUTE, FROZEN_HEAD = 0, 1, 2  # plans

Triple = tuple[Tensor, Tensor, Tensor]


def kept_ids(n: int, v: int, itemsize: int, tile: int, kept_bytes: int) -> int:
    """Returns how many ids (whole tiles) keep their logits for the backward."""
    if n == 0 or n * v * itemsize <= kept_bytes:
        return v
    return kept_bytes // (n * tile * itemsize) * tile


def empty_outputs(hidden: Tensor, weight: Tensor, tile: int, plan: int, kept_bytes: int) -> Triple:
    """Allocates log-odds, statistics, and what is kept: Jacobian rows, logits or nothing."""
    n, h = hidden.shape
    v = weight.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if plan == FROZEN_HEAD:
        kept = hidden.new_empty(n, h, dtype=wide)
    else:
        ids = 0
        if plan == RECOMPUTE:
            ids = kept_ids(n, v, hidden.element_size(), tile, kept_bytes)
        kept = hidden.new_empty(n * ids)
    stats = hidden.new_empty(n, NUM_STATS, dtype=torch.float64)
    return hidden.new_empty(n, dtype=wide), stats, kept


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


def forward(
    work: type[RowWork], problem: Problem, plan: int, kept_bytes: int, weighted: bool
) -> Triple:
    """Computes log-odds with one product per tile, two with a frozen head."""
    hidden, weight = problem.hidden, problem.weight
    log_odds, all_stats, kept = out = empty_outputs(hidden, weight, work.tile, plan, kept_bytes)
    head = Head.from_problem(problem, problem.used)
    row_work = work(head)
    n = head.hidden.shape[0]
    stats = all_stats.new_zeros(n, NUM_STATS)
    stats[:, OTHERS_MAX] = float("-inf")
    products = row_work.label_products()
    if head.bias is not None and weight.shape[0] > 0:
        products += head.bias.index_select(0, head.label_rows)
    has_label = head.has_label
    stats[:, LABEL_LOGIT] = torch.where(has_label, head.mapped(products), 0.0)
    frozen = plan == FROZEN_HEAD
    sums = kept[:n].zero_() if frozen else None
    n_kept = 0 if frozen else kept.shape[0] // max(1, hidden.shape[0])  # ids whose logits are kept
    row_work.will_write(kept)
    for first, last in head.tiles(work.tile):
        slot = None if frozen else _kept_tile(kept, n, work.tile, n_kept, first, last)
        row_work.sum_tile(first, last, stats, TileRequest(weighted, slot, sums))
    top, found = stats[:, OTHERS_MAX], has_label
    if problem.group is not None:
        head.scatter(stats, all_stats)
        own = all_stats.new_zeros(all_stats.shape[0], dtype=torch.bool)
        head.scatter(has_label, own)
        merged, owned = merge_stats(all_stats, own, problem.labels, problem.group)
        top = top.clone()
        stats.copy_(head.gather(merged))
        found = head.gather(owned)
    stats[:, OTHERS_SUM].masked_fill_(~found, 0.0)  # a label that is no id has no gradient
    stats[:, LABEL_LOGIT].masked_fill_(~found, float("nan"))
    mass, label, alone = stats[:, OTHERS_SUM], stats[:, LABEL_LOGIT], stats[:, OTHERS_SUM] == 0
    value = torch.where(alone, float("inf"), label - stats[:, OTHERS_MAX] - mass.log())
    head.scatter(torch.where(found, value, float("nan")), log_odds)
    if sums is not None:
        mine = has_label & ~alone
        if problem.group is not None:
            mass = mass * _rescaled(stats[:, OTHERS_MAX], top)
        if weight.shape[0] > 0:
            gain = torch.where(mine, head.slope(label), 0.0)
            factor = torch.where(alone, 0.0, -problem.logit_scale / mass)
            row_work.add_rows(sums, weight, head.label_rows, gain, factor)
        if problem.group is not None:
            sums.copy_(sum_over_ranks(sums, problem.group))
    head.scatter(stats, all_stats)
    return out


def _rescaled(top: Tensor, before: Tensor) -> Tensor:
    """Returns e^(top - before), +inf where `before` is -inf."""
    return torch.where(before == float("-inf"), float("inf"), (top - before).exp())


def backward(
    work: type[RowWork],
    problem: Problem,
    dlog_odds: Tensor,
    stats: Tensor,
    kept: Tensor,
    wanted: list[bool],
) -> Triple:
    """Computes the gradients; each block of the head's gradient is written once.

    Rows without an upstream gradient are dropped like those ignored; not with a group, whose ranks
    must agree on the rows.
    """
    hidden, weight, used = problem.hidden, problem.weight, problem.used
    gains = torch.where(stats[:, OTHERS_SUM] == 0, 0.0, dlog_odds.double())
    head = Head.from_problem(problem, used if problem.group is not None else used & (gains != 0))
    gains, stats = head.gather(gains).contiguous(), head.gather(stats)
    label_gains = torch.where(head.has_label, gains * head.slope(stats[:, LABEL_LOGIT]), 0.0)
    label_gains = label_gains.masked_fill(gains == 0, 0.0)  # 0 times what may be NaN
    row_work = work(head)
    (n, h), v = head.hidden.shape, weight.shape[0]
    n_kept = kept.shape[0] // max(1, hidden.shape[0])
    before, among = _rows_of_forward(head, used, n) if n_kept else (n, None)
    dhidden, dweight, dbias = empty_gradients(hidden, weight, problem.bias, wanted)
    row_work.will_write(dweight)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    whole = hidden.dtype == wide and head.places is None
    sums = dhidden if whole else hidden.new_empty(n if wanted[0] else 0, h, dtype=wide)
    sums.zero_()
    width = row_work.backward_tile()
    buffer = hidden.new_empty(n * min(width, v))
    ones = hidden.new_ones(1, n)
    for first, last in head.tiles(width):
        out = buffer[: n * (last - first)].view(n, last - first)
        slot = _kept_tile(kept, before, work.tile, n_kept, first, last)
        if slot is not None and among is not None:
            slot = slot.index_select(0, among)
        row_work.gradient_tile(first, last, stats, gains, slot, out)
        if wanted[0]:  # the label's share, still 0 here, is added in float32 below
            row_work.add_product(sums, out, weight[first:last])
        if wanted[1] or wanted[2]:
            row_work.set_labels(first, label_gains, out)
        if wanted[1]:
            torch.mm(out.t(), head.hidden, out=dweight[first:last])
        if wanted[2]:
            dbias[first:last] = torch.mm(ones, out)[0]
    if wanted[0]:
        if v > 0:
            row_work.add_rows(sums, weight, head.label_rows, label_gains, None)
        if problem.group is not None:
            sums.copy_(sum_over_ranks(sums, problem.group))
        if not whole:
            row_work.scatter(sums, None, head.places, dhidden)
    return dhidden, dweight, dbias


def _rows_of_forward(head: Head, used: Tensor, n: int) -> tuple[int, Tensor | None]:
    """Returns the number of rows in the forward, and those that take part (None: all)."""
    if head.places is None:  # none is dropped: no need to wait for a sum
        return n, None
    before = int(used.sum())
    if before == n:
        return n, None
    return before, (used.cumsum(0) - 1).index_select(0, head.places)


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]
) -> Triple:
    """Allocates the wanted gradients, as zeros because ignored rows have none."""
    return (
        hidden.new_zeros(hidden.shape if wanted[0] else (0, hidden.shape[1])),
        weight.new_empty(weight.shape if wanted[1] else (0, weight.shape[1])),
        weight.new_empty(weight.shape[0] if wanted[2] and bias is not None else 0),
    )


def frozen_head_backward(
    work: type[RowWork],
    dlog_odds: Tensor,
    labels: Tensor,
    ignore_index: int,
    stats: Tensor,
    rows: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Returns dL/dhidden = dL/dm times the stored Jacobian rows, without a product."""
    index: Tensor | None = (labels != ignore_index).nonzero()[:, 0]
    gains = torch.where(stats[:, OTHERS_SUM] == 0, 0.0, dlog_odds.double())
    nothing = gains == 0
    if index is not None and index.shape == labels.shape:
        index = None
    if index is not None:
        gains = gains.index_select(0, index)
    out = rows.new_zeros(rows.shape, dtype=dtype)
    work.scatter(rows[: gains.shape[0]], gains, index, out)
    return out.masked_fill_(nothing[:, None], 0.0)  # 0 times what may be NaN
