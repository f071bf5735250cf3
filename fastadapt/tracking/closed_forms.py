"""The closed forms behind `analytic_gradients`: ∂L/∂l of every loss, ∂L/∂m where stabler.

Notation as in `fastadapt.losses.formulas`; all is float64 and nothing is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.losses.preference import log_ratios
from fastadapt.losses.responses import Rows


class Slopes(NamedTuple):
    """∂L/∂l and ∂L/∂m of a side; without the latter, it is (1 - p) times the former."""

    logp: Tensor
    log_odds: Tensor | None = None


class Inputs(NamedTuple):
    """The inputs of the closed forms."""

    chosen: Rows
    rejected: Rows | None
    refs: tuple[Tensor | None, Tensor | None]
    candidates: Tensor | None
    candidate_mask: Tensor | None
    total_sequences: Any


def _per_token(rows: Rows, x: Tensor) -> Tensor:
    """Repeats values of responses, (B,), at each of their tokens."""
    return x[:, None] if rows.segments is None else x[rows.segments]


def _rejected(x: Inputs) -> Rows:
    """Returns the rejected side, which the objective has checked to be there."""
    assert x.rejected is not None
    return x.rejected


def _mle(x: Inputs, *, reduction: str = "token_mean") -> dict[str, Slopes]:
    """Returns -1/N, or -1/B."""
    divisor = x.chosen.tokens if reduction == "token_mean" else x.chosen.sequences
    return {"chosen": Slopes(torch.full_like(x.chosen.log_odds, -1.0) / divisor)}


def _unlikelihood_penalty(x: Inputs, *, level: str = "token") -> dict[str, Slopes]:
    """Returns p/(1-p) per token, P/(1-P) per response, or e^S̄/(1-e^S̄)."""
    b = _rejected(x)
    if level == "token":
        return {
            "rejected": Slopes(b.log_odds.exp() / b.tokens, torch.sigmoid(b.log_odds) / b.tokens)
        }
    mean = level == "sequence_mean"
    odds = 1 / torch.expm1(-b.logps(mean=mean)) / b.sequences
    if mean:
        odds = odds / b.lengths.clamp(min=1)
    return {"rejected": Slopes(_per_token(b, odds).expand_as(b.log_odds))}


def _candidate_penalty(x: Inputs) -> dict[str, Slopes]:
    """Returns p_c/(1-p_c) at each candidate."""
    assert x.candidates is not None
    m, n = x.candidates, x.chosen.tokens
    return {"candidates": Slopes(m.exp() / n, torch.sigmoid(m) / n)}


def _exmate_penalty(x: Inputs, *, norm: str = "sequence_mean") -> dict[str, Slopes]:
    """Returns the probability that the penalty equals."""
    b = _rejected(x)
    if norm == "token":
        return {"rejected": Slopes(torch.sigmoid(b.log_odds) / b.tokens)}
    if norm == "batch_token_mean":
        whole = b.token_mean(F.logsigmoid(b.log_odds)).exp() / b.tokens
        return {"rejected": Slopes(whole.expand_as(b.log_odds))}
    weight = b.logps(mean=norm == "sequence_mean").exp() / b.sequences
    if norm == "sequence_mean":
        weight = weight / b.lengths.clamp(min=1)
    return {"rejected": Slopes(_per_token(b, weight).expand_as(b.log_odds))}


def _mate_penalty(x: Inputs) -> dict[str, Slopes]:
    """Returns 1/N, whatever p is."""
    b = _rejected(x)
    return {"rejected": Slopes(torch.ones_like(b.log_odds) / b.tokens)}


def _with_mle(penalty: Callable[..., dict[str, Slopes]]) -> Callable[..., dict[str, Slopes]]:
    """Adds MLE and a coefficient times a penalty."""

    def total(x: Inputs, *, coefficient: float = 1.0, **options: Any) -> dict[str, Slopes]:
        (slopes,) = penalty(x, **options).values()
        log_odds = None if slopes.log_odds is None else coefficient * slopes.log_odds
        return {**_mle(x), "rejected": Slopes(coefficient * slopes.logp, log_odds)}

    return total


def _dpo(
    x: Inputs,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
) -> dict[str, Slopes]:
    """Returns -k on the chosen and k on the rejected response, over T if length-normalised."""
    g, b = x.chosen, _rejected(x)
    gap = log_ratios("ref_chosen_logps", g, x.refs[0], mean=length_normalized)
    gap = gap - log_ratios("ref_rejected_logps", b, x.refs[1], mean=length_normalized)
    pairs = g.lengths + b.lengths > 0
    count = pairs.sum().clamp(min=1) if x.total_sequences is None else g.sequences
    k = dpo_weight(gap, beta=beta, loss_type=loss_type, label_smoothing=label_smoothing) / count
    slopes = {}
    for name, rows, sign in (("chosen", g, -1.0), ("rejected", b, 1.0)):
        own = k / rows.lengths.clamp(min=1) if length_normalized else k
        slopes[name] = Slopes((sign * _per_token(rows, own)).expand_as(rows.log_odds))
    return slopes


def dpo_weight(
    gap: Tensor, *, beta: float = 0.1, loss_type: str = "sigmoid", label_smoothing: float = 0.0
) -> Tensor:
    """Returns k = -∂L/∂S⁺ = ∂L/∂S⁻ of each pair, for a loss of `dpo_loss`.

    Args:
        gap: u/β, that is (S⁺ - S⁺_ref) - (S⁻ - S⁻_ref), nats.
        beta: as in `dpo_loss`, and so the others.
        loss_type: as there.
        label_smoothing: as there.
    """
    u, eps = beta * gap, label_smoothing
    if loss_type == "hinge":
        return beta * (u < 1).to(gap.dtype)
    if loss_type == "ipo":
        return 1 / beta - 2 * gap
    k = beta * ((1 - eps) * torch.sigmoid(-u) - eps * torch.sigmoid(u))
    if loss_type == "robust":
        k = beta * ((1 - eps) * torch.sigmoid(-u) + eps * torch.sigmoid(u)) / (1 - 2 * eps)
    return k


CLOSED_FORMS: dict[str, Callable[..., dict[str, Slopes]]] = {
    "mle": _mle,
    "unlikelihood": _with_mle(_unlikelihood_penalty),
    "exmate": _with_mle(_exmate_penalty),
    "mate": _with_mle(_mate_penalty),
    "dpo": _dpo,
    "unlikelihood_penalty": _unlikelihood_penalty,
    "candidate_unlikelihood_penalty": _candidate_penalty,
    "exmate_penalty": _exmate_penalty,
    "mate_penalty": _mate_penalty,
}
