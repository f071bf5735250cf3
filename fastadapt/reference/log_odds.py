"""References of the operators of a head: full logits, masked logsumexp, autograd."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastadapt.reference.ranks import gathered

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def label_log_odds(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Reference of `fastadapt.label_log_odds`.

    Examples:
        >>> from fastadapt import reference
        >>> reference.label_log_odds(torch.zeros(2, 3), torch.tensor([1, -100]))
        tensor([-0.6931,  0.0000])
    """
    used = labels != ignore_index
    index = torch.where(used, labels, 0)[..., None]
    log_odds = candidate_log_odds(logits, index, used[..., None])
    return log_odds[..., 0]


def candidate_log_odds(logits: Tensor, index: Tensor, mask: Tensor | None = None) -> Tensor:
    """Reference of `fastadapt.candidate_log_odds`; holds K copies of the logits.

    Examples:
        >>> from fastadapt import reference
        >>> reference.candidate_log_odds(torch.zeros(1, 3), torch.tensor([[0, 2]]))
        tensor([[-0.6931, -0.6931]])
    """
    x = logits if logits.dtype == torch.float64 else logits.float()
    used = torch.ones_like(index, dtype=torch.bool) if mask is None else mask
    c = torch.where(used, index, 0)[..., None]  # (..., K, 1)
    rows = x[..., None, :].expand(*index.shape, x.shape[-1])
    others = rows.scatter(-1, c, float("-inf"))
    some = (others != float("-inf")).any(-1)
    # a row without others has m = +inf and no gradient: keep logsumexp away from it
    lse = torch.where(some[..., None], others, 0.0).logsumexp(-1)
    lse = torch.where(others.amax(-1) == float("inf"), float("nan"), lse)
    log_odds = torch.where(some, rows.gather(-1, c)[..., 0] - lse, float("inf"))
    return torch.where(used, log_odds, 0.0)


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
    """Reference of `fastadapt.linear_log_odds`; holds all logits whatever `memory_budget` says.

    With a group every rank gathers the whole head and does everything itself.

    Examples:
        >>> from fastadapt import reference
        >>> hidden, weight = torch.ones(2, 4), torch.zeros(3, 4)
        >>> reference.linear_log_odds(hidden, weight, torch.tensor([1, -100]))
        tensor([-0.6931,  0.0000])
    """
    z = head_logits(hidden, weight, bias, softcap, logit_scale, group, lora)
    log_odds = label_log_odds(z, labels, ignore_index=ignore_index)
    if not outputs:
        return log_odds
    used = labels != ignore_index
    y = torch.where(used, labels, 0)[..., None]
    extra = _of_all(z, used) | {"hit": used & (z.gather(-1, y)[..., 0] >= z.amax(-1))}
    found = [extra[name] for name in outputs]
    return (log_odds, *(found if differentiable else (x.detach() for x in found)))


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
    """Reference of `fastadapt.linear_candidate_log_odds`; holds K copies of the logits.

    Examples:
        >>> from fastadapt import reference
        >>> hidden, weight = torch.ones(1, 4), torch.zeros(3, 4)
        >>> reference.linear_candidate_log_odds(hidden, weight, torch.tensor([[0, 2]]))
        tensor([[-0.6931, -0.6931]])
    """
    z = head_logits(hidden, weight, bias, softcap, logit_scale, group, lora)
    log_odds = candidate_log_odds(z, index, mask)
    if not outputs:
        return log_odds
    meant = torch.ones_like(index, dtype=torch.bool) if mask is None else mask
    used = meant.any(-1)
    inside = torch.zeros_like(z, dtype=torch.bool)
    for c, m in zip(index.unbind(-1), meant.unbind(-1), strict=True):
        here = torch.nn.functional.one_hot(torch.where(m, c, 0), z.shape[-1]).bool()
        inside |= here & m[..., None]
    extra = _of_all(z, used) | {"set_log_odds": _set_log_odds(z, inside, used)}
    found = [extra[name] for name in outputs]
    return (log_odds, *(found if differentiable else (x.detach() for x in found)))


def linear_top_k(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    labels: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Reference of `fastadapt.linear_top_k`: sorts all logits.

    Examples:
        >>> from fastadapt import reference
        >>> hidden, weight = torch.ones(1, 1), torch.tensor([[3.0], [1.0], [2.0]])
        >>> reference.linear_top_k(hidden, weight, 2, labels=torch.tensor([0]))[0]
        tensor([[2, 1]])
    """
    z = head_logits(hidden, weight, bias, softcap, logit_scale, None, lora).detach()
    used = torch.ones(z.shape[:-1], dtype=torch.bool, device=z.device)
    if labels is not None:
        used = labels != ignore_index
        own = torch.where(used, labels, 0)[..., None]
        z = z.scatter(-1, own, float("-inf"))
    values, index = z.sort(stable=True, dim=-1, descending=True)
    more = (0, max(0, k - z.shape[-1]))
    values = torch.nn.functional.pad(values[..., :k], more, value=float("-inf"))
    index = torch.nn.functional.pad(index[..., :k], more)
    there = (values > float("-inf")) & used[..., None]
    return torch.where(there, index, 0), there


def linear_mle_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    lora: tuple[Tensor, Tensor, float] | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Reference of `fastadapt.linear_mle_loss`; holds all logits whatever `memory_budget` says.

    Examples:
        >>> from fastadapt import reference
        >>> hidden, weight = torch.ones(2, 4), torch.zeros(3, 4)
        >>> reference.linear_mle_loss(hidden, weight, torch.tensor([1, -100]))
        tensor(1.0986)
    """
    options: dict[str, Any] = {
        "softcap": softcap,
        "logit_scale": logit_scale,
        "ignore_index": ignore_index,
        "lora": lora,
    }
    m, lse = linear_log_odds(hidden, weight, labels, bias, outputs=["logsumexp"], **options)
    losses = (1 - label_smoothing) * -torch.nn.functional.logsigmoid(m) + z_loss * lse.square()
    if label_smoothing:
        z = head_logits(hidden, weight, bias, None, logit_scale, None, lora)
        losses = losses + label_smoothing * (lse - z.to(lse.dtype).mean(-1))
    total = torch.where(labels == ignore_index, 0.0, losses).sum()
    if reduction == "sum":
        return total
    counted = (labels != ignore_index).sum().clamp(min=1)
    return total / (counted if num_items is None else num_items)


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    group: "ProcessGroup | None",
    lora: tuple[Tensor, Tensor, float] | None,
) -> Tensor:
    """All logits; with a group every rank gathers the whole head."""
    if lora is not None and group is not None:
        lora = lora[0], gathered(lora[1], group), lora[2]
    if group is not None:
        weight = gathered(weight, group)
        bias = None if bias is None else gathered(bias, group)
    if weight.dtype == torch.float32 and hidden.dtype in (torch.bfloat16, torch.float16):
        hidden = hidden.float()
    z = torch.nn.functional.linear(hidden, weight, bias)
    if lora is not None:  # as in peft
        a, b, scale = lora
        low = torch.nn.functional.linear(hidden.to(a.dtype), a)
        z = (z + torch.nn.functional.linear(low.to(b.dtype), b) * scale).to(z.dtype)
    z = z * logit_scale
    return z if softcap is None else softcap * (z / softcap).tanh()


def _of_all(z: Tensor, used: Tensor) -> dict[str, Tensor]:
    """The outputs that are about all entries."""
    z = z if z.dtype == torch.float64 else z.float()
    p = z.softmax(-1)
    logps = torch.where(p > 0, z, z.amax(-1, keepdim=True)).sub(z.logsumexp(-1, keepdim=True))
    made = {
        "entropy": -(p * logps).sum(-1),
        "logsumexp": z.logsumexp(-1),
        "sum_of_squares": p.square().sum(-1),
    }
    return {name: torch.where(used, x, 0.0) for name, x in made.items()}


def _set_log_odds(z: Tensor, inside: Tensor, used: Tensor) -> Tensor:
    """Log-sum-exp of the entries inside less that of the others, 0 where nothing is inside."""
    z = z if z.dtype == torch.float64 else z.float()
    others = torch.where(inside, float("-inf"), z)
    some = (others != float("-inf")).any(-1)
    others = torch.where(some[..., None], others, 0.0).logsumexp(-1)
    own = torch.where(inside | ~used[..., None], z, float("-inf")).logsumexp(-1)
    return torch.where(used, torch.where(some, own - others, float("inf")), 0.0)
