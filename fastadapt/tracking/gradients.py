"""The gradients of every loss in closed form.

A loss depends on the logits through the log-odds m_t of the labels alone, so three numbers per
token say all of it: ∂L/∂p_t, ∂L/∂l_t and ∂L/∂m_t, p = σ(m) and l = log p. The row of logits then
gets

    ∂L/∂z = ∂L/∂m (onehot(y) - q),   ‖∂L/∂z‖₁ = 2 |∂L/∂m|,   ‖∂L/∂z‖₂ = |∂L/∂m| √(1 + Σ q²),

q the softmax over the other entries. The three differ by factors that are the whole argument about
losses that explode: ∂L/∂l = p ∂L/∂p and ∂L/∂m = (1-p) ∂L/∂l. Nothing here differentiates anything;
all is float64, and `fastadapt.study.gradients.check` compares it with autograd.

Tuan & Wang 2024, arXiv 2408.16751, compare these losses by their gradients; the closed forms here
are derived, not taken from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastadapt._ops.checks import one_of
from fastadapt.losses.mixture import FORMULAS, RewardPenalizeLoss
from fastadapt.losses.responses import Responses
from fastadapt.losses.rows import checked
from fastadapt.tracking.closed_forms import Inputs
from fastadapt.tracking.slopes import SideGradients, gradients_of

Loss = str | Mapping[str, float] | RewardPenalizeLoss
SPACES = ("log_odds", "probabilities")


def analytic_gradients(
    loss: Loss,
    chosen: Responses,
    rejected: Responses | None = None,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    candidates: Tensor | None = None,
    candidate_mask: Tensor | None = None,
    inputs: Mapping[str, Any] | None = None,
    given: str = "log_odds",
    sum_squares: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> dict[str, SideGradients]:
    """Returns the gradients of a loss or a sum of losses, each from its closed form.

    Args:
        loss (str | Mapping[str, float] | RewardPenalizeLoss): a name of `FORMULAS`, such names with
            weights, or an objective, whose options then count.
        chosen (Responses): as the losses take it.
        rejected (Responses | None): the same.
        ref_chosen_logps (Tensor | None): as in `dpo_loss`.
        ref_rejected_logps (Tensor | None): as in `dpo_loss`.
        candidates (Tensor | None): as in `candidate_unlikelihood_penalty`.
        candidate_mask (Tensor | None): the same.
        inputs (Mapping[str, Any] | None): others of `RewardPenalizeLoss.forward`, by name.
        given (str): "log_odds", or "probabilities": the values in `chosen`, `rejected` and
            `candidates` are p in (0, 1) and not m.
        sum_squares (Mapping[str, Tensor] | None): of "chosen" and "rejected", shape of the
            log-odds: Σ q_j² over the entries that are not the label, in [1/(V-1), 1]. It is what
            `norm2` needs.
        **options (Any): of the losses, as in `RewardPenalizeLoss`.

    Returns:
        dict[str, SideGradients]: of "chosen" and, where given, of "rejected" and "candidates".

    Raises:
        TypeError, ValueError: those of the losses; options beside an objective.
    """
    objective = as_objective(loss, options)
    one_of("given", given, SPACES)
    if given == "probabilities":
        chosen = chosen._replace(log_odds=logit(chosen.log_odds))
        rejected = (
            None if rejected is None else rejected._replace(log_odds=logit(rejected.log_odds))
        )
        candidates = None if candidates is None else logit(candidates)
    # checks what it is given and names what is missing; not a call, which would run hooks
    with torch.no_grad():
        objective.forward(
            chosen,
            rejected,
            ref_chosen_logps,
            ref_rejected_logps,
            candidates=candidates,
            candidate_mask=candidate_mask,
            **(inputs or {}),
        )
    found = Inputs(
        checked("chosen", _wide(chosen)),
        None if rejected is None else checked("rejected", _wide(rejected)),
        (ref_chosen_logps, ref_rejected_logps),
        None if candidates is None else candidates.detach().double(),
        candidate_mask,
        chosen.total_sequences,
        dict(inputs or {}),
    )
    return gradients_of(objective, found, sum_squares)


def loss_value(objective: RewardPenalizeLoss, inputs: Mapping[str, Any]) -> Tensor:
    """Returns the loss of an objective without its metrics.

    Args:
        objective: weights and options.
        inputs: the arguments of `RewardPenalizeLoss.forward` by name; what no loss takes is unused.
    """
    terms = []
    for name, weight in objective.weights_at(0.0).items():
        taken = {k: v for k, v in inputs.items() if k in objective.inputs_of(name)}
        terms.append(weight * FORMULAS[name](**taken, **objective.options_of(name)))
    return torch.stack(terms).sum()


def as_objective(loss: Loss, options: Mapping[str, Any]) -> RewardPenalizeLoss:
    """Returns an objective for a name, a mapping of weights or an objective."""
    if isinstance(loss, RewardPenalizeLoss):
        if options:
            raise ValueError(f"options: expected none beside an objective, got {sorted(options)}")
        return loss
    return RewardPenalizeLoss({loss: 1.0} if isinstance(loss, str) else loss, **options)


def _wide(side: Responses) -> Responses:
    """Converts a side to float64."""
    return side._replace(log_odds=side.log_odds.detach().double())


def logit(p: Tensor) -> Tensor:
    """Returns the log-odds log p - log(1 - p) of probabilities."""
    return p.log() - torch.log1p(-p)
