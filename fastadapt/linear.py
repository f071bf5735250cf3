"""Log-odds under a linear head, without its logits: `fastadapt.log_odds` of tiles of products."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from fastadapt._ops.checks import fold_rows, instance, integer, number, per_row
from fastadapt._ops.linear import operator as linear_ops
from fastadapt._ops.linear.operator import plan_of as plan_of
from fastadapt._ops.linear.vocab_parallel import Slice, split_head

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OUTPUTS = ("entropy", "logsumexp", "hit")


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
    `fastadapt.linear.plan_of` tells which plan it will be and what it holds.

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
