"""Log-odds of a label against all other entries, on which all losses are built.

`m = z_y - logsumexp(z_j, j != y)`, so that `log p = -softplus(-m)`, `log(1 - p) = -softplus(m)` and
`dm/dz = onehot(y) - q` with q the softmax of the others, all without cancellation.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from fastadapt._ops import log_odds as ops
from fastadapt._ops.checks import fold_rows, instance, integer, number, per_row
from fastadapt._ops.linear import operator as linear_ops
from fastadapt._ops.linear.operator import plan_of as plan_of
from fastadapt._ops.linear.vocab_parallel import Slice, split_head

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OUTPUTS = ("entropy", "logsumexp", "hit")


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
    instance("index", index, Tensor, "a Tensor")
    shape = torch.Size((*logits.shape[:-1], index.shape[-1] if index.dim() else 0))
    flat = per_row("index", index, torch.int64, shape, rows).view(rows.shape[0], shape[-1])
    if mask is not None:
        mask = per_row("mask", mask, torch.bool, shape, rows).view(rows.shape[0], shape[-1])
    log_odds: Tensor = ops.candidate_log_odds(rows, flat, mask)[0]
    return log_odds.view(index.shape)


@overload
def linear_log_odds(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    group: "ProcessGroup | None" = None,
    memory_budget: int | None = None,
    outputs: Sequence[str],
) -> tuple[Tensor, ...]: ...
@overload
def linear_log_odds(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    group: "ProcessGroup | None" = None,
    memory_budget: int | None = None,
    outputs: tuple[()] = (),
) -> Tensor: ...
def linear_log_odds(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    group: "ProcessGroup | None" = None,
    memory_budget: int | None = None,
    outputs: Sequence[str] = (),
) -> Tensor | tuple[Tensor, ...]:
    """Returns the label log-odds of a linear head without its (N, V) logits.

    Equals `label_log_odds(z, labels)` with
    `z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)`, made in tiles of 2048
    ids (8192 on CUDA). Products are torch's. On the CPU they are in the dtype of the inputs; one of
    half precision is rounded once before its logsumexp, while the label's own logit is a float32
    dot product, so that the error of the log-odds is about a twentieth of that of rounded logits.
    On CUDA they are float32, rounded nowhere before the logsumexp (TF32 of float32 inputs if torch
    is told to use it); half precision needs torch 2.8. Sums are float32 and float64.

    With 1M = one product of N * H * V: a head that needs gradients costs 4M, forward and backward,
    or 3M for the logits that `memory_budget` lets the forward keep; a head that needs none 2M, with
    no product in the backward, which then holds N * H numbers of float32 and not the head; without
    gradients 1M. Ignored rows are dropped before the first product. The gradient of each block of
    the head is finished in one product and rounded once. Rows whose upstream gradient is 0 are
    dropped from the backward (not with a group). Beside inputs and gradients, forward and backward
    hold 2 N H numbers of float32 at most, one tile and what `memory_budget` allows;
    `fastadapt.log_odds.plan_of` tells which plan it will be and what it holds.

    On CUDA, forward and backward each wait for the device, to learn how many rows take part, so
    that neither can be captured in a CUDA graph. Products are of blocks of 1024 rows, the last
    filled up with zeros, and tiles in one order, so that the log-odds of a row do not depend on the
    other rows as far as cuBLAS computes equal shapes alike. Logits that `memory_budget` lets the
    forward keep are rounded to the dtype of the inputs, after their logsumexp. The gradient of a
    tile takes 128 MiB at most up to 65,536 rows of half precision.

    Examples:
        >>> hidden, weight = torch.ones(2, 4), torch.zeros(3, 4)
        >>> linear_log_odds(hidden, weight, torch.tensor([1, -100]))
        tensor([-0.6931,  0.0000])
        >>> labels = torch.tensor([0, 2])
        >>> log_odds, hit = linear_log_odds(hidden, weight, labels, outputs=["hit"])
        >>> hit
        tensor([True, True])

    Args:
        hidden (Tensor): (..., H), float32, bfloat16, float16, or float64 (for checks). Under
            autocast hidden, weight and bias are cast to its dtype.
        weight (Tensor): (V, H), dtype of `hidden`; or float32 over half hidden states, which are
            then taken as float32, products too.
        labels (Tensor): `hidden.shape[:-1]`, int64, ids in [0, V) or `ignore_index`.
        bias (Tensor | None): (V,), dtype of `weight`.
        softcap (float | None): above 0, bounds the logits smoothly.
        logit_scale (float): finite, multiplies the logits before the cap.
        ignore_index (int): rows with this label give 0 and no gradient.
        group (torch.distributed.ProcessGroup | None): its ranks hold the head together: weight and
            bias are this rank's consecutive slice of the vocabulary, of any size, in the order of
            the ranks; labels remain ids of the whole. Hidden states, labels, and what is done with
            the log-odds must be the same on all ranks, and so are the log-odds and the gradient of
            the hidden states; those of weight and bias are the slice's. A weight that is a DTensor
            placed as (Shard(0),) brings the group of its mesh along, and its gradient is such a
            DTensor; so do hidden states and labels that are replicated ones.
        memory_budget (int | None): bytes of logits to keep from the forward to the backward of a
            head that needs gradients; fewer are kept if fewer are needed. None: all of them where
            they take 128 MiB at most, else none.
        outputs (Sequence[str]): of "entropy" (nats), "logsumexp" (of all logits, nats) and "hit"
            (bool, no logit is larger than the label's), from the same pass. They have no gradient:
            a loss that asks for one fails in its backward. Detach what is kept, such as metrics.

    Returns:
        Tensor: shape of `labels`, float32 (float64 for float64 inputs), nats, edges as in
        `label_log_odds`; with `outputs` a tuple of the log-odds and those outputs, in their order
        and of the same shape, 0 or False in ignored rows. Raises when differentiated twice.

    Raises:
        TypeError: inputs of another dtype than `hidden`'s.
        ValueError: shapes or devices that do not agree, a softcap that is not positive, an unknown
            output, a DTensor of another placement or on another mesh; on the CPU a label out of
            range, before any work, and labels that are not the same on all ranks.
        RuntimeError: a group without torch.distributed; in the backward, a gradient of `outputs`.
    """
    for name, given in (("hidden", hidden), ("weight", weight), ("labels", labels)):
        instance(name, given, Tensor, "a Tensor")
    if bias is not None:
        instance("bias", bias, Tensor, "a Tensor or None")
    part = split_head(hidden, weight, labels, bias, group)
    rows = _in_type_of_head(fold_rows("hidden", part.hidden), part.weight)
    flat = per_row("labels", part.labels, torch.int64, part.hidden.shape[:-1], rows)
    _check_head(rows, part)
    cap = 0.0 if softcap is None else float(number("softcap", softcap, positive=True))
    logit_scale = float(number("logit_scale", logit_scale, signed=True))
    ignore_index = integer("ignore_index", ignore_index)
    if memory_budget is not None:
        memory_budget = integer("memory_budget", memory_budget, 0)
    if isinstance(outputs, str):
        raise TypeError(f"outputs: expected a sequence of names, got the string {outputs!r}")
    instance("outputs", outputs, Sequence, "a sequence of names")
    for name in outputs:
        if name not in OUTPUTS:
            raise ValueError(f"outputs: expected names of {OUTPUTS}, got {name!r}")
    log_odds: Tensor
    stats: Tensor
    log_odds, stats, _ = linear_ops.linear_log_odds(
        rows,
        part.weight,
        flat,
        part.bias,
        cap,
        logit_scale,
        ignore_index,
        part.span,
        part.group,
        plan=linear_ops.number_of(rows, part.weight, part.bias),
        kept_bytes=linear_ops.kept_bytes(
            rows.shape[0] * part.weight.shape[0] * rows.element_size(), memory_budget
        ),
        weighted="entropy" in outputs,
    )
    log_odds = log_odds.view(labels.shape)
    if not outputs:
        return log_odds
    used = part.labels != ignore_index
    extra = _extra_outputs(log_odds.detach(), stats.view(*labels.shape, stats.shape[-1]), used)
    return (log_odds, *(_tied(extra[name], log_odds, name) for name in outputs))


def _tied(values: Tensor, log_odds: Tensor, name: str) -> Tensor:
    """Returns an extra output whose gradient is refused, if the log-odds have one."""
    if not log_odds.requires_grad or not values.is_floating_point():
        return values
    tied: Tensor = linear_ops.without_gradient(values, log_odds, name)
    return tied


def _in_type_of_head(hidden: Tensor, weight: Tensor) -> Tensor:
    """Converts half-precision states to float32 for a float32 head, except under autocast."""
    half = hidden.dtype in (torch.bfloat16, torch.float16)
    casts = torch.is_autocast_enabled(hidden.device.type)
    return hidden.float() if half and weight.dtype == torch.float32 and not casts else hidden


def _check_head(hidden: Tensor, part: Slice) -> None:
    """Checks shapes, devices and dtypes, except dtypes that autocast makes equal."""
    h, weight, bias = hidden.shape[1], part.weight, part.bias
    empty = part.group is None and weight.shape[:1] == (0,)  # a slice may be
    if weight.dim() != 2 or weight.shape[1] != h or empty:
        raise ValueError(f"weight: expected shape (V, {h}), V >= 1, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    casts = torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():  # codes of a quantised head: autocast would cast them
            raise TypeError(f"{name}: expected floating-point numbers, got {tensor.dtype}")
        if tensor.dtype != hidden.dtype and not casts:
            raise TypeError(f"{name}: expected {hidden.dtype} as hidden, got {tensor.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: expected device {hidden.device}, got {tensor.device}")


def _extra_outputs(log_odds: Tensor, stats: Tensor, used: Tensor) -> dict[str, Tensor]:
    """Computes the extra outputs from the sums over the others and the label's logit."""
    best, mass, weighted, label = stats.unbind(-1)
    others = torch.where(mass == 0, float("-inf"), best + mass.log())
    logsumexp = torch.logaddexp(others, label)
    p = log_odds.double().sigmoid()
    mean = torch.where(mass == 0, 0.0, best + weighted / mass)  # of the others' logits, under q
    own = torch.where(p == 0, 0.0, p * label)  # not 0 times -inf
    entropy = logsumexp - own - (1 - p) * mean
    return {
        "entropy": torch.where(used, entropy, 0.0).to(log_odds.dtype),
        "logsumexp": torch.where(used, logsumexp, 0.0).to(log_odds.dtype),
        "hit": used & (label >= best),
    }
