"""Checks the closed forms of the gradients against autograd and finite differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.losses import Responses
from fastadapt.tracking.gradients import Loss, analytic_gradients, as_objective, logit, loss_value


class GradientCheck(NamedTuple):
    """The largest errors of the closed forms, relative to 1 + |gradient|.

    Attributes:
        autograd: from automatic differentiation, in m, l and p.
        differences: from central differences of the loss, in the same three, along a direction in
            which each token of a side moves up or down by a share of the room it has; they also
            move what a loss holds constant. None: not taken.
    """

    autograd: float
    differences: float | None


def check_gradients(
    loss: Loss,
    chosen: Responses,
    rejected: Responses | None = None,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    candidates: Tensor | None = None,
    candidate_mask: Tensor | None = None,
    inputs: Mapping[str, Any] | None = None,
    step: float = 1e-5,
    **options: Any,
) -> GradientCheck:
    """Returns the errors of `analytic_gradients` at these log-odds.

    Autograd and differences see the losses of `fastadapt.losses` and nothing of the closed forms:
    as functions of m, of l with m = l - log(1 - e^l), and of p with m = log p - log(1 - p).

    Args:
        loss: as in `analytic_gradients`, and so the others.
        step: of the differences, relative to the distance to the end of the variable's range.
        **options: of the losses.

    Returns:
        GradientCheck: rounding leaves 1e-13 and 1e-8; the errors grow with |m| in l and p.
    """
    objective = as_objective(loss, options)
    closed = analytic_gradients(
        objective,
        chosen,
        rejected,
        ref_chosen_logps,
        ref_rejected_logps,
        candidates=candidates,
        candidate_mask=candidate_mask,
        inputs=inputs,
    )
    log_odds = {"chosen": chosen.log_odds, "rejected": None, "candidates": candidates}
    if rejected is not None:
        log_odds["rejected"] = rejected.log_odds
    points = {k: m.detach().double() for k, m in log_odds.items() if m is not None}

    def value(of: Mapping[str, Tensor]) -> Tensor:
        given = {
            **(inputs or {}),
            "chosen": chosen._replace(log_odds=of["chosen"]),
            "rejected": None if rejected is None else rejected._replace(log_odds=of["rejected"]),
            "ref_chosen_logps": ref_chosen_logps,
            "ref_rejected_logps": ref_rejected_logps,
            "candidates": of.get("candidates"),
            "candidate_mask": candidate_mask,
        }
        return loss_value(objective, given)

    spaces: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
        "log_odds": (lambda m: m, lambda x: x),
        "logp": (F.logsigmoid, lambda x: x - torch.log(-torch.expm1(x))),
        "probability": (torch.sigmoid, logit),
    }
    worst, generator = [0.0, 0.0], torch.Generator().manual_seed(0)
    for space, (to, back) in spaces.items():
        x = {k: to(m) for k, m in points.items()}
        wanted = {k: getattr(closed[k], space) for k in x}
        leaves = {k: v.clone().requires_grad_() for k, v in x.items()}
        total = value({k: back(v) for k, v in leaves.items()})
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        exact = dict(zip(leaves, grads, strict=True))
        for k in x:
            found = exact[k]
            found = torch.zeros_like(x[k]) if found is None else found
            worst[0] = max(worst[0], _error(wanted[k], found))
            signs = torch.randint(2, x[k].shape, generator=generator) * 2 - 1
            direction = step * signs * _room(x[k], space)
            found = _differences(value, {j: (v, back) for j, v in x.items()}, k, direction) / step
            along = (wanted[k] * direction).sum() / step
            worst[1] = max(worst[1], _error(along, found))
    return GradientCheck(*worst)


def _differences(
    value: Callable[[Mapping[str, Tensor]], Tensor],
    at: Mapping[str, tuple[Tensor, Callable[[Tensor], Tensor]]],
    side: str,
    direction: Tensor,
) -> Tensor:
    """Returns the central difference of the loss when one side moves along a direction."""
    ends = []
    with torch.no_grad():
        for sign in (1, -1):
            moved = {k: x + sign * direction if k == side else x for k, (x, _) in at.items()}
            ends.append(value({k: at[k][1](x) for k, x in moved.items()}))
    return (ends[0] - ends[1]) / 2


def _room(x: Tensor, space: str) -> Tensor:
    """Returns the distance to the end of the variable's range, at most 1."""
    if space == "log_odds":
        return torch.ones_like(x)
    return (-x).clamp(max=1) if space == "logp" else torch.minimum(x, 1 - x)


def _error(found: Tensor, wanted: Tensor) -> float:
    """Returns the largest |difference| / (1 + |wanted|)."""
    error = (found - wanted).abs() / (1 + wanted.abs())
    return float(error.max()) if error.numel() else 0.0
