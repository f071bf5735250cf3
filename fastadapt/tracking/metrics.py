"""The numbers of a tracker's record, from margins, slopes and tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.losses import Responses, RewardPenalizeLoss
from fastadapt.losses.preference import log_ratios
from fastadapt.losses.responses import Rows, checked
from fastadapt.tracking.closed_forms import Inputs, dpo_weight
from fastadapt.tracking.displacement import Displacement
from fastadapt.tracking.gradients import SideGradients, gradients_of, options_of
from fastadapt.tracking.pair_contexts import shared_rows
from fastadapt.training.pairs import IGNORED, PairBatch

Row = dict[str, Any]
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
UNDERFLOW = math.log(torch.finfo(torch.float32).tiny)  # of log P
DEAD_ZONE = math.log1p(-1e-5) - math.log(1e-5)  # margin beyond which a clamp at 1e-5 acts
NAIVE_INF = 24 * math.log(2)  # margin beyond which 1 - p rounds to 0 in float32
_CELLS = ("good_in_good", "bad_in_bad", "bad_in_good", "good_in_bad")


def cell_metrics(
    good: Responses,
    bad: Responses,
    batch: PairBatch | None,
    cross: tuple[Responses, Responses] | None,
) -> Row:
    """Returns the four cells with their quantiles, the margin and the accuracy.

    Args:
        good: (x⁺, y⁺).
        bad: (x⁻, y⁻).
        batch: their tokens; None: it is not known whether x⁺ = x⁻.
        cross: (x⁻, y⁺) and (x⁺, y⁻); None: they are what the others are where x⁺ = x⁻ or y⁺ = y⁻.
    """
    cells: dict[str, Responses | None] = {"good_in_good": good, "bad_in_bad": bad}
    if cross is not None:
        cells |= {"bad_in_good": cross[1], "good_in_bad": cross[0]}
    elif batch is not None and _same_prompts(batch):
        cells |= {"bad_in_good": bad, "good_in_bad": good}
    elif batch is not None and _same_responses(batch):
        cells |= {"bad_in_good": good, "good_in_bad": bad}
    row: Row = {}
    for name in _CELLS:
        side = cells.get(name)
        for unit, mean in (("sum", False), ("token", True)):
            values = None
            if side is not None:
                rows = checked(name, side)
                values = rows.logps(mean=mean)[rows.lengths > 0]
            row |= _spread(f"{name}/{unit}", values)
    g, b = (checked(name, side).logps() for name, side in (("good", good), ("bad", bad)))
    if len(g) == len(b):
        row["margin"] = float((g - b).mean())
        row["accuracy"] = float((g > b).float().mean())
    return row


def cells_coincide(batch: PairBatch) -> bool:
    """Returns whether the cells that a step does not compute equal those that it does."""
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
    good, bad = inputs["good"], inputs["bad"]
    rows = Inputs(
        checked("good", good._replace(margins=good.margins.double())),
        checked("bad", bad._replace(margins=bad.margins.double())),
        (inputs.get("ref_good_logps"), inputs.get("ref_bad_logps")),
        None if inputs.get("candidates") is None else inputs["candidates"].double(),
        inputs.get("candidate_mask"),
        good.total_sequences,
    )
    assert rows.bad is not None
    slopes = gradients_of(objective, rows)
    masses = gradient_mass(slopes, rows.good, rows.bad, batch)
    row: Row = {f"mass/{name}": float(x) for name, x in masses.items()}
    row |= _weights(objective, rows)
    m, kept = rows.bad.margins, rows.bad.kept
    values = [x for side in slopes.values() for x in (side.logp, side.margin)]
    wild = sum(int((~x.isfinite()).sum()) for x in [*values, rows.good.margins, m])
    used = rows.bad.lengths > 0
    return row | {
        "count/underflow": int(((rows.bad.logps() < UNDERFLOW) & used).sum()),
        "count/dead_zone": int(((m > DEAD_ZONE) & kept).sum()),
        "count/naive_inf": int(((m > NAIVE_INF) & kept).sum()),
        "count/nonfinite": wild,
    }


def rho_metrics(found: Displacement) -> Row:
    """Returns the median and the largest ρ, how many are above 1, and of how many."""
    rho = found.rho[found.rho.isfinite()]
    return {
        "rho/median": float(rho.median()) if len(rho) else None,
        "rho/max": float(rho.max()) if len(rho) else None,
        "rho/above_one": int(found.flagged.sum()),
        "rho/pairs": len(rho),
    }


def gradient_mass(
    slopes: Mapping[str, SideGradients], good: Rows, bad: Rows, batch: PairBatch | None
) -> dict[str, Tensor]:
    """Returns Σ |∂L/∂z| on the labels of good responses, of bad ones and on all other entries.

    A row of its own puts |∂L/∂m| on its label and as much on the others. Where both responses of a
    pair have had the same tokens so far, their rows of logits are one: with one label it gets the
    sum of both slopes; with two labels y⁺ and y⁻ it gets, q⁺ and q⁻ being the softmax without the
    label,

        y⁺: g⁺ - g⁻ q⁻(y⁺),   y⁻: g⁻ - g⁺ q⁺(y⁻),   others: g⁺ (1 - q⁺(y⁻)) + g⁻ (1 - q⁻(y⁺)).

    A shared label counts as one of the good response.

    Args:
        slopes: of "good" and "bad".
        good: the good responses, padded where there is a batch.
        bad: the bad ones.
        batch: their tokens; None: all rows are taken for rows of their own.
    """
    g, b = slopes["good"].margin, slopes["bad"].margin
    if batch is None:
        return {
            "good": g.abs().sum(),
            "bad": b.abs().sum(),
            "other": g.abs().sum() + b.abs().sum(),
        }
    both = shared_rows(batch) & good.kept & bad.kept
    labels = batch.labels.chunk(2)
    same = both & (labels[0] == labels[1])
    forked = both & ~same
    alone = g.abs() + b.abs()
    # log q⁻(y⁺) = log p⁺ - log(1 - p⁻), at most 0 but for rounding
    q_good = (F.logsigmoid(good.margins) - F.logsigmoid(-bad.margins)).clamp(max=0).exp()
    q_bad = (F.logsigmoid(bad.margins) - F.logsigmoid(-good.margins)).clamp(max=0).exp()
    at_good = torch.where(forked, (g - b * q_good).abs(), g.abs())
    at_bad = torch.where(forked, (b - g * q_bad).abs(), b.abs())
    other = torch.where(forked, (g * (1 - q_bad) + b * (1 - q_good)).abs(), alone)
    return {
        "good": torch.where(same, (g + b).abs(), at_good).sum(),
        "bad": torch.where(same, 0.0, at_bad).sum(),
        "other": torch.where(same, (g + b).abs(), other).sum(),
    }


def _weights(objective: RewardPenalizeLoss, x: Inputs) -> Row:
    """What each loss multiplies the gradients of its bad side with."""
    assert x.bad is not None
    row: Row = {}
    for name in objective.weights:
        own = options_of(objective, name)
        if name == "dpo":
            mean = own.pop("length_normalized", False)
            gap = log_ratios("ref_good_logps", x.good, x.refs[0], mean=mean)
            gap = gap - log_ratios("ref_bad_logps", x.bad, x.refs[1], mean=mean)
            row["weight/dpo_k"] = float(dpo_weight(gap, **own).mean())
        elif name.startswith("exmate"):
            p = _exmate_probability(x.bad, own.get("norm", "sequence_mean"))
            row["weight/exmate"] = own.get("coefficient", 1.0) * float(p)
        elif name.startswith("unlikelihood"):
            odds = x.bad.margins[x.bad.kept].exp()
            row["weight/unlikelihood_odds"] = float(odds.median()) if len(odds) else None
            row["weight/unlikelihood_odds/max"] = float(odds.max()) if len(odds) else None
    return row


def _exmate_probability(bad: Rows, norm: str) -> Tensor:
    """The mean of the probabilities that ExMATE weighs with."""
    if norm == "token":
        return bad.token_mean(F.logsigmoid(bad.margins).exp())
    if norm == "batch_token_mean":
        return bad.token_mean(F.logsigmoid(bad.margins)).exp()
    return bad.sequence_mean(bad.logps(mean=norm == "sequence_mean").exp())


def _same_prompts(batch: PairBatch) -> bool:
    """Whether x⁺ = x⁻ in every pair."""
    good, bad = batch.mask.chunk(2)
    first = good.int().argmax(-1)
    if not bool(torch.equal(first, bad.int().argmax(-1))):
        return False
    # the row before a response's first token has seen the whole prompt
    return bool(shared_rows(batch).gather(-1, first[:, None]).all())


def _same_responses(batch: PairBatch) -> bool:
    """Whether y⁺ = y⁻ in every pair."""
    good, bad = batch.labels.chunk(2)
    return all(
        torch.equal(g[g != IGNORED], b[b != IGNORED]) for g, b in zip(good, bad, strict=True)
    )


def _spread(name: str, values: Tensor | None) -> Row:
    """The mean and the quantiles, or None of each."""
    if values is None or not len(values):
        return {name: None, **{f"{name}/{q}": None for q in QUANTILES}}
    values = values.double()
    row: Row = {name: float(values.mean())}
    at = torch.tensor(list(QUANTILES.values()), dtype=values.dtype, device=values.device)
    quantiles = values.quantile(at).tolist()
    return row | {f"{name}/{q}": x for q, x in zip(QUANTILES, quantiles, strict=True)}
