"""The losses of the gradient study: their names in tables and pictures, and their slopes."""

from __future__ import annotations

import math
from typing import Any

import torch

from fastadapt.losses import Responses
from fastadapt.tracking.gradients import analytic_gradients

LOSSES: dict[str, dict[str, float]] = {
    "MLE": {"mle": 1.0},
    "MLE + unlikelihood": {"unlikelihood": 1.0},
    "ExMATE": {"exmate": 1.0},
    "DPO": {"dpo": 1.0},
    "DPO + MLE": {"dpo": 1.0, "mle": 1.0},
    "DPO + ExMATE": {"dpo": 1.0, "exmate": 1.0},
}


def one_token(loss: str, p: float, **options: Any) -> tuple[float, float, float]:
    """Returns ∂L/∂p, ∂L/∂l and ∂L/∂m of a rejected response of one token.

    Args:
        loss: a name of `FORMULAS` with a rejected side; the chosen response is a token of p = 0.5.
        p: its probability, in (0, 1).
        **options: of the loss.
    """
    mask = torch.ones(1, 1, dtype=torch.bool)
    chosen, rejected = (
        Responses(torch.tensor([[math.log(x) - math.log1p(-x)]], dtype=torch.float64), mask)
        for x in (0.5, p)
    )
    found = analytic_gradients(loss, chosen, rejected, **options)["rejected"]
    return float(found.probability), float(found.logp), float(found.log_odds)
