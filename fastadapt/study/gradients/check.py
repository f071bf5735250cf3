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
        differences: from central differences of the loss, in the same three.
    """

    autograd: float
    differences: float


def check_gradients(
    loss: Loss,
    chosen: Responses,
    rejected: Responses | None = None,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    candidates: Tensor | None = None,
    candidate_mask: Tensor | None = None,
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
    )
    log_odds = {"chosen": chosen.log_odds, "rejected": None, "candidates": candidates}
    if rejected is not None:
        log_odds["rejected"] = rejected.log_odds
    points = {k: m.detach().double() for k, m in log_odds.items() if m is not None}

    def value(of: Mapping[str, Tensor]) -> Tensor:
        inputs = {
            "chosen": chosen._replace(log_odds=of["chosen"]),
            "rejected": None if rejected is None else rejected._replace(log_odds=of["rejected"]),
            "ref_chosen_logps": ref_chosen_logps,
            "ref_rejected_logps": ref_rejected_logps,
            "candidates": of.get("candidates"),
            "candidate_mask": candidate_mask,
        }
        return loss_value(objective, inputs)

    spaces: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
        "log_odds": (lambda m: m, lambda x: x),
        "logp": (F.logsigmoid, lambda x: x - torch.log(-torch.expm1(x))),
        "probability": (torch.sigmoid, logit),
    }
    worst = [0.0, 0.0]
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
            near = {j: (v.clone(), back) for j, v in x.items()}
            worst[1] = max(worst[1], _error(wanted[k], _differences(value, near, k, space, step)))
    return GradientCheck(*worst)


def _differences(
    value: Callable[[Mapping[str, Tensor]], Tensor],
    near: Mapping[str, tuple[Tensor, Callable[[Tensor], Tensor]]],
    side: str,
    space: str,
    step: float,
) -> Tensor:
    """Returns central differences of the loss in each token of one side."""
    x = near[side][0]
    out = torch.zeros_like(x)
    with torch.no_grad():
        for i in range(x.numel()):
            at = float(x.view(-1)[i])
            # within the range of the variable: p in (0, 1), log p < 0
            room = {"log_odds": 1.0, "logp": min(1.0, -at), "probability": min(at, 1 - at)}[space]
            h, ends = step * room, []
            for shifted in (at + h, at - h):
                x.view(-1)[i] = shifted
                ends.append(value({k: back(v) for k, (v, back) in near.items()}))
            x.view(-1)[i] = at
            out.view(-1)[i] = (ends[0] - ends[1]) / (2 * h)
    return out


def _error(found: Tensor, wanted: Tensor) -> float:
    """Returns the largest |difference| / (1 + |wanted|)."""
    error = (found - wanted).abs() / (1 + wanted.abs())
    return float(error.max()) if error.numel() else 0.0
