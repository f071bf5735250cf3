"""References of the losses of a pair's margin: its odds as a quotient of two probabilities."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt.reference.preference.pairs import Refs, log_ratios, pair_mean, preferred
from fastadapt.reference.responses import Side


class Score(NamedTuple):
    """How the two log-ratios of a pair become scores: by an f-divergence's derivative."""

    beta: float
    f_divergence: str
    alpha: float
    ld_alpha: float | None
    per_token: bool = False

    def of(self, log_ratio: Tensor, m: Tensor) -> Tensor:
        """Returns f'(t) - f'(1) of the ratio of probabilities t (f-DPO's table 1)."""
        t, a, found = log_ratio.exp(), self.alpha, log_ratio
        if self.f_divergence == "forward_kl":
            found = 1 - 1 / t
        elif self.f_divergence == "js_divergence":
            found = torch.log(2 * t / (t + 1))
        elif self.f_divergence == "alpha_divergence" and a != 1:
            found = (t ** (a - 1) - 1) / (a - 1)
        return found / max(len(m), 1) if self.per_token else found


def dpo_loss(
    chosen: Side,
    rejected: Side,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    ld_alpha: float | None = None,
) -> Tensor:
    """Reference of `fastadapt.losses.dpo_loss`; it has no `label_smoothing`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.dpo_loss(chosen, rejected, beta=0.1)
        tensor(0.5981)
        >>> reference.dpo_loss(chosen, rejected, torch.tensor([-1.0]), torch.tensor([-2.0]))
        tensor(0.6444)
    """

    def loss(u: Tensor) -> Tensor:
        return -preferred(u)[0].log()

    refs = (ref_chosen_logps, ref_rejected_logps)
    score = Score(beta, f_divergence, f_alpha, ld_alpha)
    return margin_mean(chosen, rejected, refs, pair_weights, loss, score)


def cdpo_loss(
    chosen: Side,
    rejected: Side,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    ld_alpha: float | None = None,
) -> Tensor:
    """Reference of `fastadapt.losses.cdpo_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.cdpo_loss(chosen, rejected, label_smoothing=0.2)
        tensor(0.6381)
    """

    def loss(u: Tensor) -> Tensor:
        right, swapped = preferred(u)
        return -(1 - label_smoothing) * right.log() - label_smoothing * swapped.log()

    refs = (ref_chosen_logps, ref_rejected_logps)
    score = Score(beta, f_divergence, f_alpha, ld_alpha)
    return margin_mean(chosen, rejected, refs, pair_weights, loss, score)


def robust_loss(
    chosen: Side,
    rejected: Side,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    ld_alpha: float | None = None,
) -> Tensor:
    """Reference of `fastadapt.losses.robust_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.robust_loss(chosen, rejected, label_smoothing=0.2)
        tensor(0.5315)
    """

    def loss(u: Tensor) -> Tensor:
        right, swapped = preferred(u)
        clean = (1 - label_smoothing) * right.log() - label_smoothing * swapped.log()
        return -clean / (1 - 2 * label_smoothing)

    refs = (ref_chosen_logps, ref_rejected_logps)
    score = Score(beta, f_divergence, f_alpha, ld_alpha)
    return margin_mean(chosen, rejected, refs, pair_weights, loss, score)


def hinge_loss(
    chosen: Side,
    rejected: Side,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    ld_alpha: float | None = None,
) -> Tensor:
    """Reference of `fastadapt.losses.hinge_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.hinge_loss(chosen, rejected)
        tensor(0.8000)
    """

    def loss(u: Tensor) -> Tensor:
        return 1 - u if u < 1 else 0 * u

    refs = (ref_chosen_logps, ref_rejected_logps)
    score = Score(beta, f_divergence, f_alpha, ld_alpha)
    return margin_mean(chosen, rejected, refs, pair_weights, loss, score)


def ipo_loss(
    chosen: Side,
    rejected: Side,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    length_normalized: bool = True,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    ld_alpha: float | None = None,
) -> Tensor:
    """Reference of `fastadapt.losses.ipo_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.ipo_loss(chosen, rejected)
        tensor(16.)
    """

    def loss(u: Tensor) -> Tensor:
        return (u - 0.5 / beta) ** 2

    refs = (ref_chosen_logps, ref_rejected_logps)
    score = Score(1.0, f_divergence, f_alpha, ld_alpha, per_token=length_normalized)
    return margin_mean(chosen, rejected, refs, pair_weights, loss, score)


def sigmoid_norm_loss(
    chosen: Side,
    rejected: Side,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    ld_alpha: float | None = None,
) -> Tensor:
    """Reference of `fastadapt.losses.sigmoid_norm_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.sigmoid_norm_loss(chosen, rejected, beta=5.0)
        tensor(0.0067)
    """

    def loss(u: Tensor) -> Tensor:
        return -preferred(u)[0].log()

    refs = (ref_chosen_logps, ref_rejected_logps)
    score = Score(beta, f_divergence, f_alpha, ld_alpha, per_token=True)
    return margin_mean(chosen, rejected, refs, pair_weights, loss, score)


def exo_pair_loss(
    chosen: Side,
    rejected: Side,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    ld_alpha: float | None = None,
) -> Tensor:
    """Reference of `fastadapt.losses.exo_pair_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.exo_pair_loss(chosen, rejected, label_smoothing=0.1)
        tensor(0.4063)
    """

    def loss(u: Tensor) -> Tensor:
        right, swapped = preferred(u)
        wanted = (1 - label_smoothing, label_smoothing)
        return right * (right / wanted[0]).log() + swapped * (swapped / wanted[1]).log()

    refs = (ref_chosen_logps, ref_rejected_logps)
    score = Score(beta, f_divergence, f_alpha, ld_alpha)
    return margin_mean(chosen, rejected, refs, pair_weights, loss, score)


def discopop_loss(
    chosen: Side,
    rejected: Side,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    discopop_tau: float = 0.05,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    ld_alpha: float | None = None,
) -> Tensor:
    """Reference of `fastadapt.losses.discopop_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.discopop_loss(chosen, rejected)
        tensor(0.8148)
    """

    def loss(u: Tensor) -> Tensor:
        w, rest = preferred(u / discopop_tau)
        return -rest * preferred(u)[0].log() + w * torch.exp(-u)

    refs = (ref_chosen_logps, ref_rejected_logps)
    score = Score(beta, f_divergence, f_alpha, ld_alpha)
    return margin_mean(chosen, rejected, refs, pair_weights, loss, score)


def margin_mean(
    chosen: Side,
    rejected: Side,
    refs: Refs,
    pair_weights: Tensor | None,
    loss: Callable[[Tensor], Tensor],
    score: Score,
) -> Tensor:
    """Returns the mean over pairs of a function of u, β times the gap of the scores."""

    def of_pair(i: int, g: Tensor, b: Tensor) -> Tensor:
        good, bad = log_ratios(i, g, b, refs, score.ld_alpha)
        return loss(score.beta * (score.of(good, g) - score.of(bad, b)))

    return pair_mean(chosen, rejected, of_pair, pair_weights)
