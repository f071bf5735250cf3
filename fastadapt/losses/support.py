"""Log-odds of a label against the given ids of its row: training on exactly what was sampled.

A support drawn with a token (`fastadapt.Support`) is given, not decided again: logits that are made
again differ by a rounding, and a filter's decision with them. With S the support of a row and y its
label, m = z_y - logsumexp(z_j, j in S, j != y), so that log p = -softplus(-m) is the label's under
the truncated distribution.
"""

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from fastadapt._ops.checks import (
    flag,
    fold_rows,
    head_rows,
    instance,
    integer,
    no_tangent,
    number,
    per_row,
)
from fastadapt._ops.common import check_ids
from fastadapt._ops.linear.vocab_parallel import is_distributed
from fastadapt._ops.supports.among import log_odds_among, pairs_of
from fastadapt._ops.supports.products import support_products
from fastadapt.linear import linear_log_odds
from fastadapt.log_odds import label_log_odds
from fastadapt.results import Support

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@overload
def linear_support_log_odds(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    support: Support,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    sparse: bool = False,
    full: Literal[True],
    group: "ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_support_log_odds(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    support: Support,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    sparse: bool = False,
    full: Literal[False] = False,
    group: "ProcessGroup | None" = None,
) -> Tensor: ...


def linear_support_log_odds(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    support: Support,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    sparse: bool = False,
    full: bool = False,
    group: "ProcessGroup | None" = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns each label's log-odds against the other ids of its own support, from a linear head.

    Equals `adapted_log_odds` of the logits of `linear_log_odds` if the support is the adaptor's and
    `logit_scale` is 1 / temperature. With K ids in a row it costs K dot products of H numbers and
    as much for each gradient, not V: no logit outside the support is made, forward or backward.
    Rows that are full are those of `linear_log_odds`, at its cost and with its rounding, against
    all V ids. The numbers of ids are read, so `torch.compile` breaks its graph here.

    Dot products have float32 sums (float64 for float64 inputs), whatever the inputs' dtype, and
    are rounded nowhere before the log-sum-exp, which is of float64. The gradient of the head is
    summed for each id by ascending rows, in float32, by one thread, and rounded once: the same bits
    in every run and for any number of threads, and so are those of the hidden states and, on a CPU,
    the bias. Rows whose upstream gradient is 0 are dropped from the backward. On a GPU, where the
    kernels have run in Triton's interpreter alone, sums have another order than on a CPU, and a
    call waits for the device.
    Beside its inputs and gradients the call holds a few numbers for each id of the support, and
    1 MiB.

    Examples:
        >>> hidden, weight = torch.ones(2, 4), torch.zeros(5, 4, requires_grad=True)
        >>> support = Support.from_mask(torch.tensor([[True, True, True, False, False]] * 2))
        >>> linear_support_log_odds(hidden, weight, torch.tensor([1, 4]), support)
        tensor([-0.6931,    -inf], grad_fn=<ViewBackward0>)

    Args:
        hidden (Tensor): (..., H), float32, bfloat16, float16, or float64 (for checks); cast to the
            dtype of `weight` where that is float32, or where autocast is on.
        weight (Tensor): (V, H), dtype of `hidden`, or float32; a last stride other than 1 costs a
            copy.
        labels (Tensor): `hidden.shape[:-1]`, int64, ids in [0, V) or `ignore_index`.
        support (Support): of as many rows as there are labels, in their order.
        bias (Tensor | None): (V,), dtype of `weight`.
        softcap (float | None): above 0, bounds the logits smoothly.
        logit_scale (float): finite, multiplies the logits before the cap: 1 / temperature.
        ignore_index (int): rows with this label give 0 and no gradient.
        sparse (bool): whether the gradient of `weight`, which is then a leaf, is a coalesced sparse
            COO tensor, of those ids alone that have a gradient, as `torch.nn.Embedding` has it:
            for `torch.optim.SparseAdam` and `SGD`, not for `clip_grad_norm_`. False: dense, (V, H),
            0 elsewhere. Not with full rows, whose gradient has every id.
        full (bool): whether the log-odds against the whole vocabulary are returned too, of all
            rows, from one pass of `linear_log_odds`: for what is of the whole distribution, such as
            a divergence from a reference. Rows that are full have them in both. Not with `sparse`.
        group (torch.distributed.ProcessGroup | None): must be None: a head in slices is not served.

    Returns:
        Tensor | tuple[Tensor, Tensor]: shape of `labels`, float32 (float64 for float64 inputs),
        nats; two with `full`. -inf and no gradient where the label is not in its support, +inf and
        no gradient where it is alone there; NaN where one of the others is NaN or +inf. Raises when
        differentiated twice.

    Raises:
        TypeError: inputs of another dtype than `hidden`'s, a support that is no `Support`.
        ValueError: shapes or devices that do not agree, a label or an id of the support out of
            range, ids that do not ascend; where the weight is trained, `sparse` with full rows or
            `full`, or of a weight that is no leaf.
        NotImplementedError: tensors of another device than CPU or CUDA, a group, a DTensor.
    """
    name = "linear_support_log_odds"
    for part, x in (("hidden", hidden), ("weight", weight), ("labels", labels)):
        instance(part, x, Tensor, "a Tensor")
        _on_a_known_device(name, part, x)
        if is_distributed(x):
            raise NotImplementedError(f"{name}: {part}: expected no DTensor")
    if group is not None:
        raise NotImplementedError(f"{name}: group: expected None, got a process group")
    if softcap is not None:
        number("softcap", softcap, positive=True)
    number("logit_scale", logit_scale, signed=True)
    flag("sparse", sparse)
    flag("full", full)
    sparse &= weight.requires_grad
    if sparse and full:
        raise ValueError("sparse: expected False with full=True, got True")
    if sparse and not weight.is_leaf:
        raise ValueError("sparse: expected a weight that is a leaf, got what another call made")
    states = head_rows(hidden, weight, bias, empty=False)
    y, used = _labels(labels, support, hidden.shape[:-1], states, weight.shape[0], ignore_index)
    at = (support.full & used).nonzero()[:, 0]
    if sparse and at.shape[0] > 0:
        raise ValueError(f"sparse: expected False with full rows, got {at.shape[0]} of these")
    pairs = pairs_of(y, used, support.full, support.ids, support.offsets)
    aligned = weight if weight.stride(1) == 1 else weight.contiguous()
    x = support_products(states.to(weight.dtype), aligned, pairs.ids, pairs.ends, sparse=sparse)
    if bias is not None:
        x = x + bias.double().index_select(0, pairs.ids)
    z = x if logit_scale == 1 else x * logit_scale
    z = z if softcap is None else softcap * (z / softcap).tanh()
    log_odds = log_odds_among(z, pairs).to(torch.promote_types(states.dtype, torch.float32))
    if at.shape[0] == 0 and not full:
        return log_odds.view(labels.shape)
    rows, own = (states, y) if full else (states.index_select(0, at), y[at])
    head = weight, own, bias
    options: dict[str, Any] = {
        "softcap": softcap,
        "logit_scale": logit_scale,
        "ignore_index": ignore_index,
    }
    dense = linear_log_odds(rows, *head, **options).to(log_odds.dtype)
    log_odds = log_odds.index_copy(0, at, dense[at] if full else dense).view(labels.shape)
    return (log_odds, dense.view(labels.shape)) if full else log_odds


def support_log_odds(
    logits: Tensor, labels: Tensor, support: Support, *, ignore_index: int = -100
) -> Tensor:
    """Returns each label's log-odds against the other ids of its own support, from logits.

    `linear_support_log_odds` for logits that are there: it reads those of the support alone, and
    its gradient is one matrix of zeros with their entries in it. Full rows are those of
    `label_log_odds`; beside others they cost a copy of their logits and one gradient more.

    Examples:
        >>> adaptor, logits = Adaptor(top_k=2), torch.tensor([[2.0, 1.0, 0.0, -1.0]])
        >>> support = Support.from_mask(filter_logits(logits, adaptor) > float("-inf"))
        >>> support_log_odds(logits, torch.tensor([1]), support)
        tensor([-1.])

    Args:
        logits (Tensor): (..., V), float32, bfloat16, float16, or float64 (for checks); divided
            by the temperature, if there was one.
        labels (Tensor): `logits.shape[:-1]`, int64, ids in [0, V) or `ignore_index`.
        support (Support): of as many rows as there are labels, in their order.
        ignore_index (int): rows with this label give 0 and no gradient.

    Returns:
        Tensor: shape of `labels`, float32 (float64 for float64 logits), nats; edges as in
        `linear_support_log_odds`, and +inf too where all others of the support are -inf.

    Raises:
        TypeError, ValueError, NotImplementedError: as `linear_support_log_odds`.
    """
    name = "support_log_odds"
    for part, x in (("logits", logits), ("labels", labels)):
        instance(part, x, Tensor, "a Tensor")
        _on_a_known_device(name, part, x)
    rows = fold_rows("logits", logits)
    no_tangent("logits", logits)
    y, used = _labels(labels, support, logits.shape[:-1], rows, rows.shape[1], ignore_index)
    at = (support.full & used).nonzero()[:, 0]
    wide = torch.promote_types(rows.dtype, torch.float32)
    if 0 < at.shape[0] == rows.shape[0]:
        return label_log_odds(rows, y, ignore_index=ignore_index).view(labels.shape)
    pairs = pairs_of(y, used, support.full, support.ids, support.offsets)
    log_odds = log_odds_among(rows[pairs.rows, pairs.ids].double(), pairs).to(wide)
    if at.shape[0] > 0:
        dense = label_log_odds(rows.index_select(0, at), y[at], ignore_index=ignore_index)
        log_odds = log_odds.index_copy(0, at, dense)
    return log_odds.view(labels.shape)


def _on_a_known_device(function: str, name: str, x: Tensor) -> None:
    """Raises for a tensor where there is no kernel for it."""
    if x.device.type not in ("cpu", "cuda"):
        raise NotImplementedError(
            f"{function}: {name}: expected a CPU or CUDA tensor, got one on {x.device}"
        )


def _labels(
    labels: Tensor, support: Support, shape: torch.Size, like: Tensor, v: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Returns the labels (N,) and which are used, after checks of them and of the support."""
    ignore_index = integer("ignore_index", ignore_index)
    y = per_row("labels", labels, torch.int64, shape, like)
    instance("support", support, Support, "a Support")
    if len(support) != y.shape[0]:
        raise ValueError(f"support: expected {y.shape[0]} rows, got {len(support)}")
    if support.ids.device != like.device:
        raise ValueError(f"support: expected device {like.device}, got {support.ids.device}")
    check_ids("labels", y, v, ignore_index)
    support.check(v)
    return y, y != ignore_index
