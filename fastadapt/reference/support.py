"""References of the log-odds on a given support: full logits and a dense mask of it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastadapt.reference.log_odds import head_logits, label_log_odds
from fastadapt.results import Support

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    """Reference of `fastadapt.linear_support_log_odds`; every gradient is dense.

    Examples:
        >>> from fastadapt import reference
        >>> hidden, weight = torch.ones(2, 4), torch.zeros(5, 4)
        >>> support = Support.from_mask(torch.tensor([[True, True, True, False, False]] * 2))
        >>> reference.linear_support_log_odds(hidden, weight, torch.tensor([1, 4]), support)
        tensor([-0.6931,    -inf])
    """
    z = head_logits(hidden, weight, bias, softcap, logit_scale, group, None)
    on_support = support_log_odds(z, labels, support, ignore_index=ignore_index)
    if not full:
        return on_support
    return on_support, label_log_odds(z, labels, ignore_index=ignore_index)


def support_log_odds(
    logits: Tensor, labels: Tensor, support: Support, *, ignore_index: int = -100
) -> Tensor:
    """Reference of `fastadapt.support_log_odds`.

    Examples:
        >>> from fastadapt import reference
        >>> support = Support.from_mask(torch.tensor([[True, True, False, False]]))
        >>> logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
        >>> reference.support_log_odds(logits, torch.tensor([1]), support)
        tensor([-1.])
    """
    v = logits.shape[-1]
    x = logits if logits.dtype == torch.float64 else logits.float()
    x, mask = x.reshape(-1, v), support.to_mask(v)
    used = labels.reshape(-1) != ignore_index
    y = torch.where(used, labels.reshape(-1), 0)[:, None]
    inside = mask.gather(1, y)[:, 0]
    others = torch.where(mask.scatter(1, y, False), x, float("-inf"))
    some = (others != float("-inf")).any(1) & inside & used
    # rows without a gradient are kept away from the log-sum-exp
    lse = torch.where(some[:, None], others, 0.0).logsumexp(1)
    lse = torch.where(others.amax(1) == float("inf"), float("nan"), lse)
    m = torch.where(some, x.gather(1, y)[:, 0] - lse, torch.where(inside, float("inf"), 0.0))
    m = torch.where(inside, m, float("-inf"))
    return torch.where(used, m, 0.0).view(labels.shape)
