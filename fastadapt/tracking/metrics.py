"""The numbers in a tracker's record, from log-odds, slopes and tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.losses import Responses, RewardPenalizeLoss
from fastadapt.losses.rows import Rows, checked
from fastadapt.tracking.closed_forms import Inputs, response_slopes
from fastadapt.tracking.displacement import Displacement
from fastadapt.tracking.gradients import SideGradients, gradients_of
from fastadapt.tracking.pair_contexts import shared_rows
from fastadapt.training.pairs import IGNORED, PairBatch

Row = dict[str, Any]
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
UNDERFLOW = math.log(torch.finfo(torch.float32).tiny)  # of log P
DEAD_ZONE = math.log1p(-1e-5) - math.log(1e-5)  # log-odds beyond which a clamp at 1e-5 acts
NAIVE_INF = 24 * math.log(2)  # log-odds beyond which 1 - p rounds to 0 in float32
_CELLS = ("chosen_in_chosen", "rejected_in_rejected", "rejected_in_chosen", "chosen_in_rejected")


def cell_metrics(
    chosen: Responses,
    rejected: Responses,
    batch: PairBatch | None,
    cross: tuple[Responses, Responses] | None,
) -> Row:
    """Returns the four cells with quantiles, the margin and the accuracy.

    Args:
        chosen: (x⁺, y⁺).
        rejected: (x⁻, y⁻).
        batch: their tokens; None: it is not known whether x⁺ = x⁻.
        cross: (x⁻, y⁺) and (x⁺, y⁻); None: they are what the others are where x⁺ = x⁻ or y⁺ = y⁻.
    """
    cells: dict[str, Responses | None] = {
        "chosen_in_chosen": chosen,
        "rejected_in_rejected": rejected,
    }
    if cross is not None:
        cells |= {"rejected_in_chosen": cross[1], "chosen_in_rejected": cross[0]}
    elif batch is not None and _same_prompts(batch):
        cells |= {"rejected_in_chosen": rejected, "chosen_in_rejected": chosen}
    elif batch is not None and _same_responses(batch):
        cells |= {"rejected_in_chosen": chosen, "chosen_in_rejected": rejected}
    row: Row = {}
    for name in _CELLS:
        side = cells.get(name)
        for unit, mean in (("sum", False), ("token", True)):
            values = None
            if side is not None:
                rows = checked(name, side)
                values = rows.logps(mean=mean)[rows.lengths > 0]
            row |= _spread(f"{name}/{unit}", values)
    g, b = (
        checked(name, side).logps() for name, side in (("chosen", chosen), ("rejected", rejected))
    )
    if len(g) == len(b):
        row["margin"] = float((g - b).mean())
        row["accuracy"] = float((g > b).float().mean())
    return row


def cells_coincide(batch: PairBatch) -> bool:
    """Whether the cells that a step does not compute equal those that it does."""
    return _same_prompts(batch) or _same_responses(batch)


def loss_metrics(
    objective: RewardPenalizeLoss, inputs: Mapping[str, Any], batch: PairBatch | None
) -> Row:
    """Returns gradient masses, the weights of the losses and the counters.

    Args:
        objective: the loss.
        inputs: the arguments of its call, without graphs.
        batch: the tokens; None: no row is taken for shared.
    """
    chosen, rejected = inputs["chosen"], inputs["rejected"]
    rows = Inputs(
        checked("chosen", chosen._replace(log_odds=chosen.log_odds.double())),
        checked("rejected", rejected._replace(log_odds=rejected.log_odds.double())),
        (inputs.get("ref_chosen_logps"), inputs.get("ref_rejected_logps")),
        None if inputs.get("candidates") is None else inputs["candidates"].double(),
        inputs.get("candidate_mask"),
        chosen.total_sequences,
        inputs,
    )
    assert rows.rejected is not None
    slopes = gradients_of(objective, rows)
    masses = gradient_mass(slopes, rows.chosen, rows.rejected, batch)
    row: Row = {f"mass/{name}": float(x) for name, x in masses.items()}
    row |= _weights(objective, rows)
    m, kept = rows.rejected.log_odds, rows.rejected.kept
    values = [x for side in slopes.values() for x in (side.logp, side.log_odds)]
    wild = sum(int((~x.isfinite()).sum()) for x in [*values, rows.chosen.log_odds, m])
    used = rows.rejected.lengths > 0
    return row | {
        "count/underflow": int(((rows.rejected.logps() < UNDERFLOW) & used).sum()),
        "count/dead_zone": int(((m > DEAD_ZONE) & kept).sum()),
        "count/naive_inf": int(((m > NAIVE_INF) & kept).sum()),
        "count/nonfinite": wild,
    }


def rho_metrics(found: Displacement) -> Row:
    """Returns the median and the largest ρ, how many are above 1, and how many there are."""
    rho = found.rho[found.rho.isfinite()]
    return {
        "rho/median": float(rho.median()) if len(rho) else None,
        "rho/max": float(rho.max()) if len(rho) else None,
        "rho/above_one": int(found.flagged.sum()),
        "rho/pairs": len(rho),
    }


def gradient_mass(
    slopes: Mapping[str, SideGradients], chosen: Rows, rejected: Rows, batch: PairBatch | None
) -> dict[str, Tensor]:
    """Returns Σ |∂L/∂z| on the labels of chosen and of rejected responses and on all other entries.

    A row of its own puts |∂L/∂m| on its label and as much on the others. Where both responses of a
    pair have had the same tokens so far, their rows of logits are one: with one label it gets the
    sum of both slopes; with two labels y⁺ and y⁻ it gets, q⁺ and q⁻ being the softmax without the
    label,

        y⁺: g⁺ - g⁻ q⁻(y⁺),   y⁻: g⁻ - g⁺ q⁺(y⁻),   others: g⁺ (1 - q⁺(y⁻)) + g⁻ (1 - q⁻(y⁺)).

    A shared label counts as one of the chosen response.

    Args:
        slopes: of "chosen" and "rejected".
        chosen: the chosen responses, padded where there is a batch.
        rejected: the rejected ones.
        batch: their tokens; None: all rows are taken for rows of their own.
    """
    g, b = slopes["chosen"].log_odds, slopes["rejected"].log_odds
    if batch is None:
        return {
            "chosen": g.abs().sum(),
            "rejected": b.abs().sum(),
            "other": g.abs().sum() + b.abs().sum(),
        }
    both = shared_rows(batch) & chosen.kept & rejected.kept
    labels = batch.labels.chunk(2)
    same = both & (labels[0] == labels[1])
    forked = both & ~same
    alone = g.abs() + b.abs()
    # log q⁻(y⁺) = log p⁺ - log(1 - p⁻), at most 0 but for rounding
    q_chosen = (F.logsigmoid(chosen.log_odds) - F.logsigmoid(-rejected.log_odds)).clamp(max=0).exp()
    q_rejected = (
        (F.logsigmoid(rejected.log_odds) - F.logsigmoid(-chosen.log_odds)).clamp(max=0).exp()
    )
    at_chosen = torch.where(forked, (g - b * q_chosen).abs(), g.abs())
    at_rejected = torch.where(forked, (b - g * q_rejected).abs(), b.abs())
    other = torch.where(forked, (g * (1 - q_rejected) + b * (1 - q_chosen)).abs(), alone)
    return {
        "chosen": torch.where(same, (g + b).abs(), at_chosen).sum(),
        "rejected": torch.where(same, 0.0, at_rejected).sum(),
        "other": torch.where(same, (g + b).abs(), other).sum(),
    }


def _weights(objective: RewardPenalizeLoss, x: Inputs) -> Row:
    """Returns the factors of each loss on the gradients of its rejected side."""
    assert x.rejected is not None
    row: Row = {}
    for name in objective.weights:
        own = objective.options_of(name)
        if name == "dpo":
            row["weight/dpo_k"] = float(response_slopes(name, x, own, "rejected").mean())
        elif name.startswith("exmate"):
            p = _exmate_probability(x.rejected, own.get("norm", "sequence_mean"))
            row["weight/exmate"] = own.get("coefficient", 1.0) * float(p)
        elif name.startswith("unlikelihood"):
            odds = x.rejected.log_odds[x.rejected.kept].exp()
            row["weight/unlikelihood_odds"] = float(odds.median()) if len(odds) else None
            row["weight/unlikelihood_odds/max"] = float(odds.max()) if len(odds) else None
    return row


def _exmate_probability(rejected: Rows, norm: str) -> Tensor:
    """Returns the mean of the probabilities by which ExMATE weighs."""
    if norm == "token":
        return rejected.token_mean(F.logsigmoid(rejected.log_odds).exp())
    if norm == "batch_token_mean":
        return rejected.token_mean(F.logsigmoid(rejected.log_odds)).exp()
    return rejected.sequence_mean(rejected.logps(mean=norm == "sequence_mean").exp())


def _same_prompts(batch: PairBatch) -> bool:
    """Whether x⁺ = x⁻ in every pair."""
    chosen, rejected = batch.mask.chunk(2)
    first = chosen.int().argmax(-1)
    if not bool(torch.equal(first, rejected.int().argmax(-1))):
        return False
    # the row before a response's first token has seen the whole prompt
    return bool(shared_rows(batch).gather(-1, first[:, None]).all())


def _same_responses(batch: PairBatch) -> bool:
    """Whether y⁺ = y⁻ in every pair."""
    chosen, rejected = batch.labels.chunk(2)
    return all(
        torch.equal(g[g != IGNORED], b[b != IGNORED]) for g, b in zip(chosen, rejected, strict=True)
    )


def _spread(name: str, values: Tensor | None) -> Row:
    """Returns the mean and the quantiles, or None for each."""
    if values is None or not len(values):
        return {name: None, **{f"{name}/{q}": None for q in QUANTILES}}
    values = values.double()
    row: Row = {name: float(values.mean())}
    at = torch.tensor(list(QUANTILES.values()), dtype=values.dtype, device=values.device)
    quantiles = values.quantile(at).tolist()
    return row | {f"{name}/{q}": x for q, x in zip(QUANTILES, quantiles, strict=True)}
