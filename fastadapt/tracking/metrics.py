"""The numbers in a tracker's record, from log-odds, slopes and tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.losses.mixture import RewardPenalizeLoss
from fastadapt.losses.responses import Responses
from fastadapt.losses.rows import Rows, checked
from fastadapt.tracking.closed_forms import Inputs, response_slopes
from fastadapt.tracking.displacement import Displacement
from fastadapt.tracking.pair_contexts import shared_rows
from fastadapt.training.pairs import IGNORED, PairBatch

Row = dict[str, Any]
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
UNDERFLOW = math.log(torch.finfo(torch.float32).tiny)  # of log P
DEAD_ZONE = math.log1p(-1e-5) - math.log(1e-5)  # log-odds beyond which a clamp at 1e-5 acts
NAIVE_INF = 24 * math.log(2)  # log-odds beyond which 1 - p rounds to 0 in float32
SLOPES = (
    *("weight/chosen", "weight/rejected"),
    *("mass/chosen", "mass/rejected", "mass/other"),
)  # what `slope_metrics` says
_SIDES = ("chosen", "rejected")
_CELLS = ("chosen_in_chosen", "rejected_in_rejected", "rejected_in_chosen", "chosen_in_rejected")


def cell_metrics(
    chosen: Responses,
    rejected: Responses | None,
    batch: PairBatch | None,
    cross: tuple[Responses, Responses] | None,
    *,
    pairs: bool = True,
) -> Row:
    """Returns the four cells with quantiles, the margin and the accuracy.

    Args:
        chosen: (x⁺, y⁺).
        rejected: (x⁻, y⁻); None: the step has none.
        batch: their tokens; None: it is not known whether x⁺ = x⁻, or they are no pairs.
        cross: (x⁻, y⁺) and (x⁺, y⁻); None: they are what the others are where x⁺ = x⁻ or y⁺ = y⁻.
        pairs: whether the i-th chosen response is against the i-th rejected one.
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
    g = checked("chosen", chosen).logps()
    b = None if rejected is None else checked("rejected", rejected).logps()
    if b is None or not pairs or len(g) == 0:
        return row | {"margin": None, "accuracy": None}
    return row | {"margin": float((g - b).mean()), "accuracy": float((g > b).float().mean())}


def cells_coincide(batch: PairBatch) -> bool:
    """Whether the cells that a step does not compute equal those that it does."""
    return _same_prompts(batch) or _same_responses(batch)


def slopes_of(objective: RewardPenalizeLoss, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns ∂L/∂m of each side, float64, from the gradient of the loss itself.

    One more forward and backward of the formulas, in float64, whatever the losses are.

    Args:
        objective: the loss.
        inputs: the arguments of its call.
    """
    wide = {name: _wide(x) for name, x in inputs.items()}
    sides = {name: wide[name] for name in _SIDES if wide.get(name) is not None}
    points = {k: side.log_odds.requires_grad_() for k, side in sides.items()}
    with torch.enable_grad():
        # not a call, which would run hooks
        loss, _ = objective.forward(**wide)
        found = torch.autograd.grad(loss, list(points.values()), allow_unused=True)
    return {
        k: torch.zeros_like(x) if g is None else g
        for (k, x), g in zip(points.items(), found, strict=True)
    }


def slope_metrics(
    slopes: Mapping[str, Tensor],
    chosen: Responses,
    rejected: Responses | None,
    batch: PairBatch | None,
) -> Row:
    """Returns gradient masses and how hard a step pushes each side.

    Args:
        slopes: ∂L/∂m of each side, float64.
        chosen: as of the loss, and so the others.
        rejected: None: the step has none.
        batch: the tokens; None: no row is taken for shared.
    """
    row: Row = {}
    kept = {}
    for name, side, sign in (("chosen", chosen, -1.0), ("rejected", rejected, 1.0)):
        row[f"weight/{name}"] = None
        if side is None:
            continue
        rows = checked(name, side._replace(log_odds=side.log_odds.double()))
        kept[name] = rows
        row[f"weight/{name}"] = _weight(sign * slopes[name], rows)
    masses = gradient_mass(slopes, kept["chosen"], kept.get("rejected"), batch)
    return row | {f"mass/{name}": float(x) for name, x in masses.items()}


def counters(
    chosen: Responses, rejected: Responses | None, slopes: Mapping[str, Tensor] | None
) -> Row:
    """Returns how many rejected responses and tokens, and numbers, are beyond what floats say."""
    rows = checked("chosen", chosen._replace(log_odds=chosen.log_odds.double()))
    wild = [rows.log_odds, *({} if slopes is None else slopes).values()]
    row: Row = {"count/underflow": 0, "count/dead_zone": 0, "count/naive_inf": 0}
    if rejected is not None:
        rows = checked("rejected", rejected._replace(log_odds=rejected.log_odds.double()))
        m, kept = rows.log_odds, rows.kept
        wild.append(m)
        row = {
            "count/underflow": int(((rows.logps() < UNDERFLOW) & (rows.lengths > 0)).sum()),
            "count/dead_zone": int(((m > DEAD_ZONE) & kept).sum()),
            "count/naive_inf": int(((m > NAIVE_INF) & kept).sum()),
        }
    return row | {"count/nonfinite": sum(int((~x.isfinite()).sum()) for x in wild)}


def named_weights(objective: RewardPenalizeLoss, inputs: Mapping[str, Any]) -> Row:
    """Returns the factors of losses that have a name, on the gradients of their rejected side."""
    row: Row = {}
    wide = {name: _wide(x) for name, x in inputs.items()}
    if wide.get("rejected") is None:
        return row
    g, b = (checked(name, wide[name]) for name in _SIDES)
    refs = wide.get("ref_chosen_logps"), wide.get("ref_rejected_logps")
    given = Inputs(g, b, refs, None, None, wide["chosen"].total_sequences, wide)
    for name in objective.weights:
        own = objective.options_of(name)
        if name == "dpo":
            row["weight/dpo_k"] = float(response_slopes(name, given, own, "rejected").mean())
        elif name.startswith("exmate"):
            p = _exmate_probability(b, own.get("norm", "sequence_mean"))
            row["weight/exmate"] = own.get("coefficient", 1.0) * float(p)
        elif name.startswith("unlikelihood"):
            odds = b.log_odds[b.kept].exp()
            row["weight/unlikelihood_odds"] = float(odds.median()) if len(odds) else None
            row["weight/unlikelihood_odds/max"] = float(odds.max()) if len(odds) else None
    return row


def rho_metrics(found: Displacement | None) -> Row:
    """Returns the median and the largest ρ, how many are above 1, and how many there are."""
    if found is None:
        return {"rho/median": None, "rho/max": None, "rho/above_one": 0, "rho/pairs": 0}
    rho = found.rho[found.rho.isfinite()]
    return {
        "rho/median": float(rho.median()) if len(rho) else None,
        "rho/max": float(rho.max()) if len(rho) else None,
        "rho/above_one": int(found.flagged.sum()),
        "rho/pairs": len(rho),
    }


def gradient_mass(
    slopes: Mapping[str, Tensor], chosen: Rows, rejected: Rows | None, batch: PairBatch | None
) -> dict[str, Tensor]:
    """Returns Σ |∂L/∂z| on the labels of chosen and of rejected responses and on all other entries.

    A row of its own puts |∂L/∂m| on its label and as much on the others. Where both responses of a
    pair have had the same tokens so far, their rows of logits are one: with one label it gets the
    sum of both slopes; with two labels y⁺ and y⁻ it gets, q⁺ and q⁻ being the softmax without the
    label,

        y⁺: g⁺ - g⁻ q⁻(y⁺),   y⁻: g⁻ - g⁺ q⁺(y⁻),   others: g⁺ (1 - q⁺(y⁻)) + g⁻ (1 - q⁻(y⁺)).

    A shared label counts as one of the chosen response.

    Args:
        slopes: ∂L/∂m of "chosen" and, where there are any, of "rejected".
        chosen: the chosen responses, padded where there is a batch.
        rejected: the rejected ones, or None.
        batch: their tokens; None: all rows are taken for rows of their own.
    """
    g, b = slopes["chosen"], slopes.get("rejected", slopes["chosen"].new_zeros(0))
    if batch is None or rejected is None:
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


def _weight(slopes: Tensor, rows: Rows) -> float | None:
    """Returns the mean over responses of B ∂L/∂S, of what falls on each of its tokens' log p.

    For a loss of S alone that is its derivative; B is what the loss divides by.
    """
    rest = torch.sigmoid(-rows.log_odds)
    by_logp = torch.where((rest > 0) & rows.kept, slopes / rest, 0.0)
    some = rows.lengths > 0
    if not bool(some.any()):
        return None
    each = rows.sum(by_logp)[some] / rows.lengths[some]
    return float(each.mean() * rows.sequences)


def _wide(x: Any) -> Any:
    """Returns a side or a tensor of floats without its graph, in float64."""
    if isinstance(x, Responses):
        return x._replace(log_odds=x.log_odds.detach().double())
    floats = isinstance(x, Tensor) and x.is_floating_point()
    return x.detach().double() if floats else x


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
