"""Gradients of an objective at checked responses, each loss from its closed form.

All is float64, and nothing is differentiated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt.tracking.closed_forms import Inputs, Slopes, closed_form


class SideGradients(NamedTuple):
    """Gradients of a loss at the tokens of one side; float64, 0 at tokens that do not count.

    Attributes:
        probability: shape of the log-odds; ∂L/∂p_t, the probability taken as free.
        logp: the same; ∂L/∂l_t, l_t = log p_t. Infinite only where e^m is.
        log_odds: the same; ∂L/∂m_t.
        norm1: per row of logits, ‖∂L/∂z‖₁. Of candidates (..., K) it has shape (...) and belongs to
            the penalty alone, whose candidates are taken to differ from each other.
        norm2: per row of logits, ‖∂L/∂z‖₂; None where Σ q² was not given, and of candidates.
    """

    probability: Tensor
    logp: Tensor
    log_odds: Tensor
    norm1: Tensor
    norm2: Tensor | None


def gradients_of(
    objective: Any,
    inputs: Inputs,
    sum_squares: Mapping[str, Tensor] | None = None,
) -> dict[str, SideGradients]:
    """Returns the gradients of a `RewardPenalizeLoss` on each side, in three variables."""
    sides = {"chosen": (inputs.chosen.log_odds, inputs.chosen.kept)}
    if inputs.rejected is not None:
        sides["rejected"] = (inputs.rejected.log_odds, inputs.rejected.kept)
    if inputs.candidates is not None and inputs.candidate_mask is not None:
        counted = inputs.candidate_mask & inputs.chosen.kept[..., None]
        sides["candidates"] = (inputs.candidates, counted)
    totals = {side: [torch.zeros_like(m), torch.zeros_like(m)] for side, (m, _) in sides.items()}
    for name, weight in objective.weights_at(0.0).items():
        for side, slopes in closed_form(name, inputs, objective.options_of(name)).items():
            totals[side][0] += weight * slopes.logp
            totals[side][1] += weight * _log_odds_slope(slopes, sides[side][0])
    return {
        side: _side(side, sides[side], (total[0], total[1]), (sum_squares or {}).get(side))
        for side, total in totals.items()
    }


def _log_odds_slope(slopes: Slopes, m: Tensor) -> Tensor:
    """Returns ∂L/∂m from ∂L/∂l; 0 where 1 - p has underflowed."""
    if slopes.log_odds is not None:
        return slopes.log_odds
    rest = torch.sigmoid(-m)
    return torch.where(rest == 0, 0.0, slopes.logp * rest)


def _side(
    side: str, at: tuple[Tensor, Tensor], slopes: tuple[Tensor, Tensor], squares: Tensor | None
) -> SideGradients:
    """Adds norms to the slopes of a side, 0 where nothing counts."""
    m, kept = at
    p = torch.sigmoid(m)
    logp, log_odds = (torch.where(kept, x.expand_as(m), 0.0) for x in slopes)
    probability = torch.where(kept, logp / p, 0.0)
    if side == "candidates":
        # entry c of the row: ∂L/∂m_c - p_c Σ_{c'≠c} ∂L/∂l_c'; all entries sum to 0
        entries = log_odds - p * (logp.sum(-1, keepdim=True) - logp)
        entries = torch.where(kept, entries, 0.0)
        rest = torch.where(kept, p, 0.0).sum(-1).neg().add(1) * logp.sum(-1)
        return SideGradients(probability, logp, log_odds, entries.abs().sum(-1) + rest.abs(), None)
    norm2 = None if squares is None else log_odds.abs() * (1 + squares.double()).sqrt()
    return SideGradients(probability, logp, log_odds, 2 * log_odds.abs(), norm2)
