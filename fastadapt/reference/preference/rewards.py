"""References of the losses of the two rewards of a pair."""

import torch
from torch import Tensor

from fastadapt.reference.preference.pairs import log_ratios, pair_mean, preferred
from fastadapt.reference.responses import Side, each


def nca_pair_loss(
    chosen: Side,
    rejected: Side,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    ld_alpha: float | None = None,
) -> Tensor:
    """Reference of `fastadapt.losses.nca_pair_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.nca_pair_loss(chosen, rejected)
        tensor(1.3425)
    """
    refs = (ref_chosen_logps, ref_rejected_logps)

    def loss(i: int, g: Tensor, b: Tensor) -> Tensor:
        good, bad = log_ratios(i, g, b, refs, ld_alpha)
        up, down = preferred(beta * good)
        of_both = down.log() + preferred(beta * bad)[1].log()
        return -up.log() - of_both / 2

    return pair_mean(chosen, rejected, loss, pair_weights)


def bco_pair_loss(
    chosen: Side,
    rejected: Side,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    ld_alpha: float | None = None,
) -> Tensor:
    """Reference of `fastadapt.losses.bco_pair_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.bco_pair_loss(chosen, rejected)
        tensor(1.2970)
    """
    refs = (ref_chosen_logps, ref_rejected_logps)

    def loss(i: int, g: Tensor, b: Tensor) -> Tensor:
        good, bad = log_ratios(i, g, b, refs, ld_alpha)
        return -torch.log(preferred(beta * good)[0] * preferred(beta * bad)[1])

    return pair_mean(chosen, rejected, loss, pair_weights)


def sppo_hard_loss(
    chosen: Side,
    rejected: Side,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    ld_alpha: float | None = None,
) -> Tensor:
    """Reference of `fastadapt.losses.sppo_hard_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.sppo_hard_loss(chosen, rejected, beta=0.5)
        tensor(6.6253)
    """
    refs = (ref_chosen_logps, ref_rejected_logps)

    def loss(i: int, g: Tensor, b: Tensor) -> Tensor:
        good, bad = log_ratios(i, g, b, refs, ld_alpha)
        return (good - 0.5 / beta) ** 2 + (bad + 0.5 / beta) ** 2

    return pair_mean(chosen, rejected, loss, pair_weights)


def apo_zero_loss(
    chosen: Side,
    rejected: Side,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    ld_alpha: float | None = None,
) -> Tensor:
    """Reference of `fastadapt.losses.apo_zero_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.apo_zero_loss(chosen, rejected)
        tensor(0.9505)
    """
    refs = (ref_chosen_logps, ref_rejected_logps)

    def loss(i: int, g: Tensor, b: Tensor) -> Tensor:
        good, bad = log_ratios(i, g, b, refs, ld_alpha)
        return preferred(beta * good)[1] + preferred(beta * bad)[0]

    return pair_mean(chosen, rejected, loss, pair_weights)


def apo_down_loss(
    chosen: Side,
    rejected: Side,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    ld_alpha: float | None = None,
) -> Tensor:
    """Reference of `fastadapt.losses.apo_down_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.apo_down_loss(chosen, rejected)
        tensor(0.9297)
    """
    refs = (ref_chosen_logps, ref_rejected_logps)

    def loss(i: int, g: Tensor, b: Tensor) -> Tensor:
        good, bad = log_ratios(i, g, b, refs, ld_alpha)
        return preferred(beta * good)[0] + preferred(beta * (good - bad))[1]

    return pair_mean(chosen, rejected, loss, pair_weights)


def cal_dpo_loss(
    chosen: Side,
    rejected: Side,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    ld_alpha: float | None = None,
) -> Tensor:
    """Reference of `fastadapt.losses.cal_dpo_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.cal_dpo_loss(chosen, rejected, beta=0.5)
        tensor(6.7523)
    """
    refs = (ref_chosen_logps, ref_rejected_logps)

    def loss(i: int, g: Tensor, b: Tensor) -> Tensor:
        good, bad = log_ratios(i, g, b, refs, ld_alpha)
        squares = (good - 0.5 / beta) ** 2 + (bad + 0.5 / beta) ** 2
        return -preferred(good - bad)[0].log() + squares

    return pair_mean(chosen, rejected, loss, pair_weights)


def dpop_loss(
    chosen: Side,
    rejected: Side,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    dpop_lambda: float = 50.0,
    ld_alpha: float | None = None,
) -> Tensor:
    """Reference of `fastadapt.losses.dpop_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.dpop_loss(chosen, rejected, dpop_lambda=5.0)
        tensor(0.8037)
    """
    refs = (ref_chosen_logps, ref_rejected_logps)

    def loss(i: int, g: Tensor, b: Tensor) -> Tensor:
        good, bad = log_ratios(i, g, b, refs, ld_alpha)
        short = -good if good < 0 else 0 * good
        return -preferred(beta * (good - bad - dpop_lambda * short))[0].log()

    return pair_mean(chosen, rejected, loss, pair_weights)


def tdpo_loss(
    chosen: Side,
    rejected: Side,
    chosen_divergences: Tensor,
    rejected_divergences: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    tdpo_alpha: float = 0.5,
    variant: str = "tdpo2",
) -> Tensor:
    """Reference of `fastadapt.losses.tdpo_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> kl = torch.tensor([[0.5, 0.1]])
        >>> reference.tdpo_loss(chosen, rejected, kl, 3 * kl)
        tensor(0.6256)
    """
    refs = (ref_chosen_logps, ref_rejected_logps)
    above = each(chosen, chosen_divergences), each(rejected, rejected_divergences)

    def loss(i: int, g: Tensor, b: Tensor) -> Tensor:
        good, bad = log_ratios(i, g, b, refs)
        of_good, of_bad = above[0][i].sum(), above[1][i].sum()
        if variant == "tdpo1":
            return -preferred(beta * (good + of_good - bad - of_bad))[0].log()
        gap = good - bad - tdpo_alpha * (of_bad - of_good.detach())
        return -preferred(beta * gap)[0].log()

    return pair_mean(chosen, rejected, loss)
