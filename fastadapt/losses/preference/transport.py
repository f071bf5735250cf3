"""Alignment by optimal transport: the sorted margins, or rewards, of a batch against each other.

Notation as in `rows.py`.
"""

import torch
from torch import Tensor

from fastadapt._ops.checks import number
from fastadapt.losses.responses import Responses
from fastadapt.losses.rows import Pairs, pairs_of
from fastadapt.losses.scores import logistic, smoothing_of


def aot_loss(
    chosen: Responses,
    rejected: Responses,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ld_alpha: float | None = None,
) -> Tensor:
    """Returns AOT of pairs: DPO of the batch's sorted margins against the sorted reference margins.

    With a = sort(S⁺ - S⁻) and b = sort(S⁺_ref - S⁻_ref), `-(1-ε) log σ(β (a_i - b_i)) - ε log σ(-β
    (a_i - b_i))` (Melnyk et al. 2024, arXiv 2406.05882, eq. 8). It compares distributions: the
    order of the pairs' margins is free. The loss depends on which pairs share a call: micro-batches
    sort apart, and do not add up to the loss of the whole batch. Arguments as `dpo_loss`, ε as in
    `cdpo_loss`; 0 as the reference's margin without a reference.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> aot_loss(chosen, rejected)
        tensor(0.5981)
    """
    share = smoothing_of(label_smoothing)
    pairs = pairs_of(chosen, rejected)
    references = pairs.references(ref_chosen_logps, ref_rejected_logps)
    return _sorted_loss(pairs, pairs.logps(ld_alpha=ld_alpha).gap, references.gap, beta, share)


def aot_unpaired_loss(
    chosen: Responses,
    rejected: Responses,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ld_alpha: float | None = None,
) -> Tensor:
    """Returns AOT of two sets: DPO of the sorted rewards of one side against those of the other.

    As `aot_loss` with a = sort(r⁺) and b = sort(r⁻) (Melnyk et al. 2024, arXiv 2406.05882, eq. 9):
    as many of each side, whichever belongs to which. It sorts the call's responses: see there.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> aot_unpaired_loss(chosen, rejected)
        tensor(0.5981)
    """
    share = smoothing_of(label_smoothing)
    pairs = pairs_of(chosen, rejected)
    ratios = pairs.ratios(ref_chosen_logps, ref_rejected_logps, ld_alpha)
    return _sorted_loss(pairs, ratios.chosen, ratios.rejected, beta, share)


def _sorted_loss(
    pairs: Pairs, upper: Tensor, lower: Tensor, beta: float, smoothing: float
) -> Tensor:
    """Returns the smoothed logistic loss of β (sort(upper) - sort(lower)) over the pairs there are.

    The i-th smallest against the i-th smallest; pairs without tokens are left out.
    """
    beta = number("beta", beta, positive=True)
    ranked = (
        torch.where(pairs.counted, x, float("inf")).sort(stable=True).values for x in (upper, lower)
    )
    there = torch.arange(len(upper), device=upper.device) < pairs.counted.sum()
    high, low = (torch.where(there, x, 0) for x in ranked)
    return pairs._replace(counted=there).mean(logistic(beta * (high - low), smoothing))
