"""Log-odds under a linear head, without its logits: `fastadapt.log_odds` of tiles of products."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, overload

import torch
from torch import Tensor

from fastadapt._ops.checks import flag, instance, integer, listed_shape, number, per_row
from fastadapt._ops.linear import operator as linear_ops
from fastadapt._ops.linear import plans
from fastadapt._ops.linear.plans import plan_of as plan_of
from fastadapt._ops.linear.values import Listed, first_places, is_largest
from fastadapt._ops.linear.vocab_parallel import Slice, rows_of_slice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OUTPUTS = ("entropy", "hit", "logsumexp", "sum_of_squares")
CANDIDATE_OUTPUTS = ("entropy", "logsumexp", "set_log_odds", "sum_of_squares")
_ABSENT, _NO_ID = -100, -1


class _Options(NamedTuple):
    """What the functions of a linear head have in common."""

    softcap: float | None
    logit_scale: float
    group: "ProcessGroup | None"
    memory_budget: int | None
    outputs: Sequence[str]
    differentiable: bool


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
    lora: tuple[Tensor, Tensor, float] | None = None,
    memory_budget: int | None = None,
    outputs: Sequence[str],
    differentiable: bool = True,
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
    lora: tuple[Tensor, Tensor, float] | None = None,
    memory_budget: int | None = None,
    outputs: tuple[()] = (),
    differentiable: bool = True,
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
    lora: tuple[Tensor, Tensor, float] | None = None,
    memory_budget: int | None = None,
    outputs: Sequence[str] = (),
    differentiable: bool = True,
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
    gradients 1M. Of a head that needs none but has an adapter whose B does, 3M or 2M. Ignored rows
    are dropped before the first product. The gradient of each block of the head is finished in one
    product and rounded once. Rows whose upstream gradient is 0 are dropped from the backward (not
    with a group). Beside inputs and gradients, forward and backward hold 2 N H numbers of float32
    at most, one tile and what `memory_budget` allows; `fastadapt.linear.plan_of` tells which plan
    it will be and what it holds.

    On CUDA, forward and backward each wait for the device, to learn how many rows take part, so
    that neither can be captured in a CUDA graph. Products are of blocks of 1024 rows, the last
    filled up with zeros, and tiles in one order, so that the log-odds of a row do not depend on the
    other rows as far as cuBLAS computes equal shapes alike; with a frozen head whose gradient is
    made with them, up to 512 rows are filled up to 512. From sm_90 on, a head of half precision
    that is trained or needs no gradient, without an adapter, sums the logits of up to 512 rows, and
    with H < 4096 of any number, inside a product of our own, and writes none but those kept. Logits
    that `memory_budget` lets the forward keep are rounded to the dtype of the inputs, after their
    logsumexp. The gradient of a tile takes 128 MiB at most up to 65,536 rows of half precision.

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
            autocast hidden, weight and bias are cast to its dtype; a float32 weight tile by tile,
            so that no copy of it is held, with a float32 gradient.
        weight (Tensor): (V, H), dtype of `hidden`; or float32 over half hidden states, which are
            then taken as float32, products too.
        labels (Tensor): `hidden.shape[:-1]`, int64, the id to score at each position, in [0, V), or
            `ignore_index`. Nothing is shifted: of a causal model it is the next token's, as in
            `hidden[:, :-1]` with `labels[:, 1:]`.
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
        lora (tuple[Tensor, Tensor, float] | None): (A, B, scale) of a LoRA adapter, A (r, H), B
            (V, r), with a group the rows of its slice: `scale * (hidden @ A.T) @ B.T` is added to
            the products, before the bias; the merged head is never made. Their dtypes are their
            own, float32, bfloat16 or float16 (float64 with float64): as in peft, hidden states are
            cast to that of A for the product with it, under autocast all to its type; from there on
            the adapter's part is float32 (float64), and gradients are rounded once. A trained A
            takes hidden states that are finite, in ignored rows too.
        memory_budget (int | None): bytes of logits to keep from the forward to the backward of a
            head that needs gradients, in whole tiles; fewer are kept if fewer are needed. None: as
            many as the head's gradient has or 384 MiB, and unless all fit 128 MiB never so many
            that more is held than all logits would take.
        outputs (Sequence[str]): of "entropy" (nats), "logsumexp" (of all logits, nats),
            "sum_of_squares" (of all probabilities) and "hit" (bool, no logit is larger than the
            label's), from the same pass, with gradients: free for a head that needs gradients, and
            "logsumexp" for any; the other two cost a frozen head one product more, 3M.
        differentiable (bool): False, for metrics: the outputs have no gradient and cost no
            product; a loss that asks for one fails in its backward.

    Returns:
        Tensor: shape of `labels`, float32 (float64 for float64 inputs), nats, edges as in
        `label_log_odds`; with `outputs` a tuple of the log-odds and those outputs, in their order
        and of the same shape, 0 or False in ignored rows. Raises when differentiated twice.

    Raises:
        TypeError: inputs of another dtype than `hidden`'s.
        ValueError: shapes or devices that do not agree, a softcap that is not positive, an unknown
            output, a DTensor of another placement or on another mesh; on the CPU a label out of
            range, before any work, and labels that are not the same on all ranks.
        RuntimeError: a group without torch.distributed; in the backward, a gradient of `outputs`
            that are not `differentiable`.
    """
    options = _Options(softcap, logit_scale, group, memory_budget, outputs, differentiable)
    _check_options(options, OUTPUTS)
    ignore_index = integer("ignore_index", ignore_index)
    instance("labels", labels, Tensor, "a Tensor")
    part, rows = rows_of_slice(hidden, weight, labels, bias, group, lora)
    flat = per_row("labels", part.labels, torch.int64, part.hidden.shape[:-1], rows)
    listed, stats = _listed(rows, part, flat[:, None], ignore_index, options, masked=False)
    used = flat != ignore_index
    made = {
        "log_odds": listed.set_log_odds,
        "hit": lambda: is_largest(listed.own, stats),
        **listed.of_all(),
    }
    return _results(made, used, options, labels.shape, rows.dtype)


def linear_candidate_log_odds(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    group: "ProcessGroup | None" = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    memory_budget: int | None = None,
    outputs: Sequence[str] = (),
    differentiable: bool = True,
) -> Tensor | tuple[Tensor, ...]:
    """Returns the log-odds of several ids of each row under a linear head, without its logits.

    Equals `candidate_log_odds(z, index, mask)` of the logits of `linear_log_odds`; plans, products,
    rounding and memory are the same. The candidates' own logits are float32 dot products, the
    others are summed without them, and nothing is subtracted from a sum: log-odds are exact also
    where one candidate, or all of them together, hold nearly all the mass.

    With `outputs=("set_log_odds",)` comes m_S = logsumexp(z_S) - logsumexp(the others), so that
    `-softplus(-m_S)` and `-softplus(m_S)` are the logarithms of the set's mass and of what is left,
    with all digits of the smaller one.

    Examples:
        >>> hidden, weight = torch.ones(1, 4), torch.zeros(4, 4)
        >>> index = torch.tensor([[0, 2]])
        >>> linear_candidate_log_odds(hidden, weight, index, outputs=["set_log_odds"])
        (tensor([[-1.0986, -1.0986]]), tensor([0.]))

    Args:
        hidden (Tensor): (..., H), as in `linear_log_odds`.
        weight (Tensor): (V, H), as there.
        index (Tensor): `(*hidden.shape[:-1], K)`, int64, ids in [0, V), K >= 1; an id may come
            repeatedly.
        mask (Tensor | None): shape of `index`, bool; candidates with False give 0 and no gradient,
            whatever their id. None: all are meant.
        bias (Tensor | None): (V,), as there.
        softcap (float | None): as there.
        logit_scale (float): as there.
        group (torch.distributed.ProcessGroup | None): as there; `index` and `mask` are the same on
            all ranks.
        lora (tuple[Tensor, Tensor, float] | None): as there.
        memory_budget (int | None): as there.
        outputs (Sequence[str]): of "set_log_odds" (of the candidates of a row together, nats),
            "logsumexp", "entropy" and "sum_of_squares", as there.
        differentiable (bool): as there.

    Returns:
        Tensor: shape of `index`, float32 (float64 for float64 inputs), nats; with `outputs` a tuple
        of it and those outputs, of the shape of the rows; 0 in rows without a candidate. A frozen
        head makes 2M products, as there. Raises when differentiated twice.

    Raises:
        TypeError, ValueError, RuntimeError: as `linear_log_odds`; on the CPU an id out of range.
            On CUDA its row is NaN, without a gradient.
    """
    options = _Options(softcap, logit_scale, group, memory_budget, outputs, differentiable)
    _check_options(options, CANDIDATE_OUTPUTS)
    instance("index", index, Tensor, "a Tensor")
    part, rows = rows_of_slice(hidden, weight, index, bias, group, lora)
    shape = listed_shape(part.labels, part.hidden.shape[:-1])
    if shape[-1] == 0:
        raise ValueError(f"index: expected K >= 1 ids a row, got shape {tuple(shape)}")
    ids = per_row("index", part.labels, torch.int64, shape, rows).view(-1, shape[-1])
    meant = torch.ones_like(ids, dtype=torch.bool)
    if mask is not None:
        meant = per_row("mask", mask, torch.bool, shape, rows).view(ids.shape)
    ids = torch.where(meant, torch.where(ids == _ABSENT, _NO_ID, ids), _ABSENT)
    first = first_places(ids)
    once = first == torch.arange(ids.shape[1], device=ids.device)
    listed, _ = _listed(rows, part, torch.where(once, ids, _ABSENT), _ABSENT, options, masked=True)
    used = meant.any(1)
    made = {
        "log_odds": lambda: torch.where(meant, listed.label_log_odds().gather(1, first), 0.0),
        "set_log_odds": listed.set_log_odds,
        **listed.of_all(),
    }
    return _results(made, used, options, shape[:-1], rows.dtype)


def _check_options(options: _Options, names: Sequence[str]) -> None:
    """Checks what does not depend on tensors."""
    if options.softcap is not None:
        number("softcap", options.softcap, positive=True)
    number("logit_scale", options.logit_scale, signed=True)
    if options.memory_budget is not None:
        integer("memory_budget", options.memory_budget, 0)
    flag("differentiable", options.differentiable)
    if isinstance(options.outputs, str):
        raise TypeError(
            f"outputs: expected a sequence of names, got the string {options.outputs!r}"
        )
    instance("outputs", options.outputs, Sequence, "a sequence of names")
    for name in options.outputs:
        if name not in names:
            raise ValueError(f"outputs: expected names of {names}, got {name!r}")


def _listed(
    rows: Tensor,
    part: Slice,
    labels: Tensor,
    ignore_index: int,
    options: _Options,
    *,
    masked: bool,
) -> tuple[Listed, Tensor]:
    """Calls the operator for labels (N, K); returns its results and statistics."""
    moments = any(name in plans.MOMENTS for name in options.outputs)
    shares = moments or "logsumexp" in options.outputs  # own and others not as their difference
    low, differentiable = plans.low_rank(rows, part.lora), moments and options.differentiable
    own, others, of_others, stats, _ = linear_ops.linear_log_odds(
        rows,
        part.weight,
        labels,
        part.bias,
        0.0 if options.softcap is None else float(options.softcap),
        float(options.logit_scale),
        ignore_index,
        part.span,
        part.group,
        *(low or ()),
        plan=plans.number_of(rows, part.weight, part.bias, differentiable, low),
        kept_bytes=plans.kept_bytes(rows, part.weight, options.memory_budget),
        moments=moments,
        apart=labels.shape[1] > 1 or (shares and options.differentiable),
        masked=masked,
    )
    return Listed(own, others, of_others), stats


def _results(
    made: dict[str, Callable[[], Tensor]],
    used: Tensor,
    options: _Options,
    shape: torch.Size,
    dtype: torch.dtype,
) -> Tensor | tuple[Tensor, ...]:
    """Returns the log-odds and the outputs, 0 in rows that do not count."""
    wide = torch.promote_types(dtype, torch.float32)
    found: list[Tensor] = []
    for name in ("log_odds", *options.outputs):
        values = made[name]()
        rows = used.view(-1, *[1] * (values.dim() - 1))
        values = torch.where(rows, values, torch.zeros_like(values))
        values = values.view(*shape, *values.shape[1:])
        found.append(values if values.dtype == torch.bool else values.to(wide))
    first, *rest = found
    if not options.differentiable:
        rest = [
            _tied(x.detach(), first, name) for x, name in zip(rest, options.outputs, strict=True)
        ]
    return (first, *rest) if options.outputs else first


def _tied(values: Tensor, log_odds: Tensor, name: str) -> Tensor:
    """Returns an extra output whose gradient is refused, if the log-odds have one."""
    if not log_odds.requires_grad or not values.is_floating_point():
        return values
    tied: Tensor = linear_ops.without_gradient(values, log_odds, name)
    return tied
