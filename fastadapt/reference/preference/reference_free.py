"""References of the losses of pairs without a reference model."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastadapt.reference.losses import mle_loss
from fastadapt.reference.preference.pairs import pair_mean, preferred
from fastadapt.reference.responses import Side, log_of, miss_of_mean, probabilities


def cpo_loss(
    chosen: Side,
    rejected: Side,
    gold: Side | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    nll_weight: float = 1.0,
) -> Tensor:
    """Reference of `fastadapt.losses.cpo_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.cpo_loss(chosen, rejected)
        tensor(1.0082)
    """
    loss = compared(chosen, rejected, loss_of(loss_type, beta, label_smoothing, 0.0))
    return loss + nll_weight * mle_loss(chosen if gold is None else gold)


def simpo_loss(
    chosen: Side,
    rejected: Side,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Reference of `fastadapt.losses.simpo_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.simpo_loss(chosen, rejected)
        tensor(0.2014)
    """
    return compared(chosen, rejected, loss_of("tpo-l", beta, label_smoothing, gamma))


def alphapo_loss(
    chosen: Side,
    rejected: Side,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    alphapo_alpha: float = 0.25,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Reference of `fastadapt.losses.alphapo_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.alphapo_loss(chosen, rejected)
        tensor(0.1249)
    """

    def loss(g: Tensor, b: Tensor) -> Tensor:
        rewards = []
        for m in (g, b):
            root = (log_of(*probabilities(m)).sum() / len(m)).exp()  # the geometric mean
            alpha = alphapo_alpha
            rewards.append((1 - root**-alpha) / alpha if alpha != 0 else root.log())
        right, swapped = preferred(beta * (rewards[0] - rewards[1]) - gamma)
        return -(1 - label_smoothing) * right.log() - label_smoothing * swapped.log()

    return compared(chosen, rejected, loss)


def orpo_loss(
    chosen: Side, rejected: Side, gold: Side | None = None, *, beta: float = 0.1
) -> Tensor:
    """Reference of `fastadapt.losses.orpo_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.orpo_loss(chosen, rejected)
        tensor(0.4252)
    """

    def loss(g: Tensor, b: Tensor) -> Tensor:
        odds = []
        for m in (g, b):
            root = (log_of(*probabilities(m)).sum() / len(m)).exp()
            odds.append(root / miss_of_mean(m))
        return -torch.log(odds[0] / (odds[0] + odds[1]))

    return mle_loss(chosen if gold is None else gold) + beta * compared(chosen, rejected, loss)


def slic_loss(
    chosen: Side,
    rejected: Side,
    gold: Side | None = None,
    *,
    delta: float = 1.0,
    nll_weight: float = 0.1,
) -> Tensor:
    """Reference of `fastadapt.losses.slic_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.slic_loss(chosen, rejected, delta=4.0)
        tensor(2.0820)
    """

    def loss(g: Tensor, b: Tensor) -> Tensor:
        short = delta - log_of(*probabilities(g)).sum() + log_of(*probabilities(b)).sum()
        return short if short > 0 else 0 * short

    likelihood = mle_loss(chosen if gold is None else gold, reduction="sequence_sum")
    return compared(chosen, rejected, loss) + nll_weight * likelihood


def tpo_loss(
    chosen: Side,
    rejected: Side,
    gold: Side,
    *,
    beta: float = 0.01,
    loss_type: str = "sigmoid",
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    nll_weight: float = 1.0,
) -> Tensor:
    """Reference of `fastadapt.losses.tpo_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.tpo_loss(chosen, rejected, chosen, beta=0.1)
        tensor(1.0082)
    """
    loss = compared(chosen, rejected, loss_of(loss_type, beta, label_smoothing, gamma))
    return loss + nll_weight * mle_loss(gold)


def compared(chosen: Side, rejected: Side, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Returns the mean over the pairs whose responses both have tokens."""
    return pair_mean(chosen, rejected, lambda i, g, b: loss(g, b), both=True)


def loss_of(
    loss_type: str, beta: float, smoothing: float, gamma: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the loss of a pair, given its log-odds, of a type of CPO's and TPO's."""

    def loss(g: Tensor, b: Tensor) -> Tensor:
        logs = [log_of(*probabilities(m)) for m in (g, b)]
        if loss_type == "ipo":
            return (logs[0].mean() - logs[1].mean() - 0.5 / beta) ** 2
        if loss_type == "hinge":
            short = 1 - beta * (logs[0].sum() - logs[1].sum())
            return short if short > 0 else 0 * short
        if loss_type == "sigmoid":
            right, swapped = preferred(beta * (logs[0].sum() - logs[1].sum()))
        else:
            right, swapped = preferred(beta * (logs[0].mean() - logs[1].mean()) - gamma)
        return -(1 - smoothing) * right.log() - smoothing * swapped.log()

    return loss
