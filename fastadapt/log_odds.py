"""Log-odds of a label against all other entries, on which all losses are built.

`m = z_y - logsumexp(z_j, j != y)`, so that `log p = -softplus(-m)`, `log(1 - p) = -softplus(m)` and
`dm/dz = onehot(y) - q` with q the softmax of the others, all without cancellation.
"""

import torch
from torch import Tensor

from fastadapt._ops import log_odds as ops
from fastadapt._ops.checks import (
    fold_rows,
    instance,
    integer,
    listed_shape,
    no_tangent,
    per_row,
)


def label_log_odds(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Returns each label's log-odds `z_y - logsumexp(z_j, j != y)`, differentiably.

    One read of the logits forward, one read and one write backward. Sums are float32 over
    stretches of 1024 ids (of 4096 on CUDA) and float64 beyond; whatever the log-odds, the relative
    error is that of float32.

    Examples:
        >>> logits = torch.zeros(2, 3)
        >>> label_log_odds(logits, torch.tensor([1, -100]))
        tensor([-0.6931,  0.0000])

    Args:
        logits (Tensor): (..., V), float32, bfloat16, float16, or float64 (for checks); any row
            stride, a last stride other than 1 costs one copy.
        labels (Tensor): `logits.shape[:-1]`, int64, ids in [0, V) or `ignore_index`.
        ignore_index (int): rows with this label give 0 and no gradient.

    Returns:
        Tensor: shape of `labels`, float32 (float64 for float64 logits), nats. +inf and zero
        gradient where V is 1 or all other logits are -inf; NaN where one of the others is NaN or
        +inf, or the label's own is NaN; on CUDA, NaN without a gradient where the label is out of
        range. Raises when differentiated twice.

    Raises:
        TypeError: logits or labels of another dtype.
        ValueError: another shape or device; on the CPU a label out of range, before any work.
    """
    rows = fold_rows("logits", logits)
    no_tangent("logits", logits)
    flat = per_row("labels", labels, torch.int64, logits.shape[:-1], rows)
    ignore_index = integer("ignore_index", ignore_index)
    log_odds: Tensor = ops.label_log_odds(rows, flat, ignore_index)[0]
    return log_odds.view(labels.shape)


def candidate_log_odds(logits: Tensor, index: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the log-odds of several ids of one row, each against all other entries.

    `m_c = z_c - logsumexp(z_j, j != c)`: what token unlikelihood over previous tokens penalises
    (`-log(1 - p_c) = softplus(m_c)`). Exact also where one candidate holds nearly all the mass,
    because the largest entry is kept apart from the sum of all others.

    Examples:
        >>> candidate_log_odds(torch.zeros(1, 3), torch.tensor([[0, 2]]))
        tensor([[-0.6931, -0.6931]])

    Args:
        logits (Tensor): (..., V), as in `label_log_odds`.
        index (Tensor): `(*logits.shape[:-1], K)`, int64, ids in [0, V); an id may come repeatedly.
        mask (Tensor | None): shape of `index`, bool; candidates with False give 0 and no gradient,
            whatever their id. None: all are meant.

    Returns:
        Tensor: shape of `index`, float32 (float64 for float64 logits), nats; edges and gradients
        as in `label_log_odds`. Raises when differentiated twice.

    Raises:
        TypeError, ValueError: as `label_log_odds`.
    """
    rows = fold_rows("logits", logits)
    no_tangent("logits", logits)
    instance("index", index, Tensor, "a Tensor")
    shape = listed_shape(index, logits.shape[:-1])
    flat = per_row("index", index, torch.int64, shape, rows).view(rows.shape[0], shape[-1])
    if mask is not None:
        mask = per_row("mask", mask, torch.bool, shape, rows).view(rows.shape[0], shape[-1])
    log_odds: Tensor = ops.candidate_log_odds(rows, flat, mask)[0]
    return log_odds.view(index.shape)
