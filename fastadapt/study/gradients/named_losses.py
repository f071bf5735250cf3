"""The losses of the gradient study: their names in tables and pictures, and their slopes."""

from __future__ import annotations

import math
from typing import Any

import torch

from fastadapt.losses import CATALOGUE, Responses, RewardPenalizeLoss
from fastadapt.losses.catalogue import Entry
from fastadapt.tracking.gradients import analytic_gradients

LOSSES: dict[str, dict[str, float]] = {
    "MLE": {"mle": 1.0},
    "MLE + unlikelihood": {"unlikelihood": 1.0},
    "ExMATE": {"exmate": 1.0},
    "DPO": {"dpo": 1.0},
    "DPO + MLE": {"dpo": 1.0, "mle": 1.0},
    "DPO + ExMATE": {"dpo": 1.0, "exmate": 1.0},
}


def has_rejected_side(entry: Entry) -> bool:
    """Whether a loss has a coefficient on rejected tokens, or on candidates."""
    return any(row.rejected != "0" for row in entry.gradients)


def one_token(loss: str, p: float, **options: Any) -> tuple[float, float, float]:
    """Returns ∂L/∂p, ∂L/∂l and ∂L/∂m of a rejected response, or candidate, of one token.

    Args:
        loss: a name of `FORMULAS` with a rejected side; the chosen response is a token of p = 0.5.
            There is no reference; reference point, shift of the rewards and divergences are 0.
        p: its probability, in (0, 1).
        **options: of the loss.
    """
    mask = torch.ones(1, 1, dtype=torch.bool)
    at = torch.tensor([[math.log(p) - math.log1p(-p)]], dtype=torch.float64)
    chosen, rejected = Responses(torch.zeros_like(at), mask), Responses(at, mask)
    zeros = torch.zeros_like(at)
    others = {
        "gold": chosen,
        **dict.fromkeys(("reference_point", "reward_shift"), zeros[0, 0]),
        **dict.fromkeys(("chosen_divergences", "rejected_divergences"), zeros),
    }
    objective = RewardPenalizeLoss({loss: 1.0}, **options)
    found = analytic_gradients(
        objective,
        chosen,
        rejected,
        candidates=at[..., None],
        candidate_mask=mask[..., None],
        inputs={k: v for k, v in others.items() if objective.needs(k)},
    )["candidates" if "candidates" in CATALOGUE[loss].needs else "rejected"]
    return float(found.probability), float(found.logp), float(found.log_odds)
