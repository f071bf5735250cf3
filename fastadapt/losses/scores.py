"""Scores of two responses, and what a loss of preferences makes of their difference.

Notation: S is log P of a response, r = S - S_ref its log-ratio to a reference, u = β (r⁺ - r⁻). All
is float64.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt._ops.checks import number, one_of

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


class Sides(NamedTuple):
    """One number a response of each side, (B,)."""

    chosen: Tensor
    rejected: Tensor

    @property
    def gap(self) -> Tensor:
        """The difference of a pair."""
        return self.chosen - self.rejected


def scored(ratios: Sides, f_divergence: str, f_alpha: float) -> Sides:
    """Returns f'(e^r) - f'(1) of both sides.

    f-DPO (Wang et al. 2023, arXiv 2309.16240, table 1): r for the reverse KL divergence, 1 - e^-r
    for the forward one, log 2 + log σ(r) for Jensen and Shannon's, (e^(r(a-1)) - 1) / (a-1) for
    that of alpha a, which is r at a = 1.
    """
    one_of("f_divergence", f_divergence, F_DIVERGENCES)
    alpha = number("f_alpha", f_alpha, signed=True)
    if f_divergence == "forward_kl":
        return Sides(*(-exponential(-r) for r in ratios))
    if f_divergence == "js_divergence":
        return Sides(*(math.log(2) + F.logsigmoid(r) for r in ratios))
    if f_divergence == "alpha_divergence" and alpha != 1:
        return Sides(*(exponential(r * (alpha - 1)) / (alpha - 1) for r in ratios))
    return ratios


def exponential(x: Tensor) -> Tensor:
    """Returns e^x - 1, which goes on along its tangent from x = 700.

    Near there float64 ends, and an infinite slope would meet the 0 of a margin that is won.
    """
    beyond = math.exp(700) * (x - 699)
    return torch.where(x > 700, beyond, torch.expm1(x.clamp(max=700)))


def margin(
    ratios: Sides,
    beta: float,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    lengths: Sides | None = None,
) -> Tensor:
    """Returns u, (B,): β times the gap of the pairs' scores, divided by the lengths if given."""
    scores = scored(ratios, f_divergence, f_alpha)
    if lengths is not None:
        scores = Sides(*(x / n for x, n in zip(scores, lengths, strict=True)))
    return number("beta", beta, positive=True) * scores.gap


def logistic(x: Tensor, smoothing: float = 0.0) -> Tensor:
    """Returns -log σ(x), or -(1-ε) log σ(x) - ε log σ(-x) with a share ε of labels swapped."""
    right = -F.logsigmoid(x)
    return right if smoothing == 0 else (1 - smoothing) * right - smoothing * F.logsigmoid(-x)


def probability(x: Tensor) -> Tensor:
    """Returns σ(x) with the slope σ(x) σ(-x): that of `sigmoid`, s - s², is 0 from x = 37 on."""
    return F.logsigmoid(x).exp()


def smoothing_of(value: object, *, positive: bool = False) -> float:
    """Returns a share of swapped labels, in [0, 1/2), or (0, 1/2)."""
    share = number("label_smoothing", value, positive=positive)
    if share >= 0.5:
        low = "(" if positive else "["
        raise ValueError(f"label_smoothing: expected a value in {low}0, 0.5), got {share}")
    return share
