"""Losses of pairs without a reference model: CPO, SimPO, AlphaPO, ORPO, SLiC-HF, TPO.

A pair counts where both responses have tokens. Notation as in `rows.py`; S̄ = S/T is the mean
log-probability of a token of the response. Those that hold the policy near good text by a
likelihood term take `gold`, the responses that it is of.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt._ops.checks import number, one_of
from fastadapt.losses.responses import Responses
from fastadapt.losses.rows import Pairs, Rows, checked, pairs_of, sequence_log_odds
from fastadapt.losses.scores import Sides, exponential, logistic, smoothing_of

CPO_LOSS_TYPES = ("sigmoid", "hinge", "ipo")
TPO_LOSS_TYPES = (*CPO_LOSS_TYPES, "tpo-l")


def cpo_loss(
    chosen: Responses,
    rejected: Responses,
    gold: Responses | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    nll_weight: float = 1.0,
) -> Tensor:
    """Returns CPO, `-log σ(β (S⁺ - S⁻))` plus `nll_weight` times the MLE loss of the chosen side.

    Xu et al. 2024, arXiv 2401.08417, eq. 5. With trl's other types, "hinge", `max(0, 1 - β (S⁺ -
    S⁻))`, and "ipo", `(S̄⁺ - S̄⁻ - 1/(2β))²`; `nll_weight` is its `cpo_alpha`. Per pair ∂L/∂S⁺ = -β
    σ(-β (S⁺ - S⁻)).

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> cpo_loss(chosen, rejected)
        tensor(1.0082)

    Args:
        chosen (Responses): as in `dpo_loss`.
        rejected (Responses): as in `dpo_loss`.
        gold (Responses | None): the responses of the MLE loss, token mean. None: the chosen ones.
        beta (float): > 0.
        loss_type (str): as above.
        label_smoothing (float): ε in [0, 1/2), as in `cdpo_loss`; 0 but for "sigmoid".
        nll_weight (float): >= 0.

    Returns:
        Tensor: as `dpo_loss`.

    Raises:
        TypeError, ValueError: as `dpo_loss`.
    """
    one_of("loss_type", loss_type, CPO_LOSS_TYPES)
    pairs = pairs_of(chosen, rejected, both=True)
    loss = _preference(pairs, beta, loss_type, label_smoothing)
    return _with_likelihood(loss, _imitated(pairs, gold), nll_weight)


def simpo_loss(
    chosen: Responses,
    rejected: Responses,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Returns SimPO, `-log σ(v)` with v = β (S̄⁺ - S̄⁻) - γ.

    Meng et al. 2024, arXiv 2405.14734, eq. 6; in trl it is a type of CPO. Per pair ∂L/∂S⁺ = -β
    σ(-v) / T⁺. Arguments as `cpo_loss`.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> simpo_loss(chosen, rejected)
        tensor(0.2014)
    """
    return _of_means(pairs_of(chosen, rejected, both=True), beta, gamma, label_smoothing)


def alphapo_loss(
    chosen: Responses,
    rejected: Responses,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    alphapo_alpha: float = 0.25,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Returns AlphaPO: SimPO of the rewards `(1 - e^(-α S̄)) / α`, S̄ itself at α = 0.

    Gupta et al. 2025, arXiv 2501.03884, eq. 7. Per pair ∂L/∂S⁺ = -β σ(-v) e^(-α S̄⁺) / T⁺: with α >
    0 it grows where the response is unlikely. Arguments as `simpo_loss`; α of either sign.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> alphapo_loss(chosen, rejected)
        tensor(0.1249)
    """
    share = smoothing_of(label_smoothing)
    alpha = number("alphapo_alpha", alphapo_alpha, signed=True)
    pairs = pairs_of(chosen, rejected, both=True)
    rewards = pairs.logps(mean=True)
    if alpha != 0:
        rewards = Sides(*(-exponential(-alpha * x) / alpha for x in rewards))
    gap = number("beta", beta, positive=True) * rewards.gap
    return pairs.mean(logistic(gap - number("gamma", gamma), share))


def orpo_loss(
    chosen: Responses, rejected: Responses, gold: Responses | None = None, *, beta: float = 0.1
) -> Tensor:
    """Returns ORPO, the MLE loss of the chosen side plus β times `-log σ(log odds⁺ - log odds⁻)`.

    The odds are P̄/(1-P̄), P̄ = e^S̄ the geometric mean of a response's token probabilities (Hong
    et al. 2024, arXiv 2403.07691, eq. 6 and 7; β is its λ). Per pair ∂L/∂S⁺ = -β σ(-h) / ((1 - P̄⁺)
    T⁺), h the difference of the log-odds: finite in the log-odds of the tokens, though 1 - P̄ goes
    to 0, where trl has an infinite loss and a gradient of NaN from log-odds of 17 on.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> orpo_loss(chosen, rejected)
        tensor(0.4252)

    Args:
        chosen (Responses): as in `dpo_loss`.
        rejected (Responses): as in `dpo_loss`.
        gold (Responses | None): the responses of the MLE loss, token mean. None: the chosen ones.
            Those with the labels of their prompts too make trl's loss, which takes the likelihood
            of prompt and response.
        beta (float): > 0.

    Returns:
        Tensor: as `dpo_loss`.

    Raises:
        TypeError, ValueError: as `dpo_loss`.
    """
    beta = number("beta", beta, positive=True)
    pairs = pairs_of(chosen, rejected, both=True)
    odds = Sides(*(sequence_log_odds(rows, mean=True) for rows in (pairs.chosen, pairs.rejected)))
    # a response without tokens has log-odds of +inf: the gradient of inf - inf is NaN, used or not
    odds = Sides(*(torch.where(pairs.counted, x, 0) for x in odds))
    loss = pairs.mean(logistic(odds.gap))
    return _with_likelihood(beta * loss, _imitated(pairs, gold), 1.0)


def slic_loss(
    chosen: Responses,
    rejected: Responses,
    gold: Responses | None = None,
    *,
    delta: float = 1.0,
    nll_weight: float = 0.1,
) -> Tensor:
    """Returns SLiC-HF, `max(0, δ - S⁺ + S⁻)` plus `nll_weight` times `-S` of the gold responses.

    Zhao et al. 2023, arXiv 2305.10425, eq. 1, whose δ and λ are `delta` and `nll_weight`. Per pair
    ∂L/∂S⁺ = -1 where S⁺ - S⁻ < δ. `hinge_loss` is with a reference, and without the likelihood.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> slic_loss(chosen, rejected, delta=4.0)
        tensor(2.0820)

    Args:
        chosen (Responses): as in `dpo_loss`.
        rejected (Responses): as in `dpo_loss`.
        gold (Responses | None): the responses of the likelihood, a mean over them. None: the chosen
            ones.
        delta (float): >= 0, nats.
        nll_weight (float): >= 0.

    Returns:
        Tensor: as `dpo_loss`.

    Raises:
        TypeError, ValueError: as `dpo_loss`.
    """
    delta = number("delta", delta)
    pairs = pairs_of(chosen, rejected, both=True)
    loss = pairs.mean(torch.relu(delta - pairs.logps().gap))
    gold_rows = _imitated(pairs, gold)
    return _with_likelihood(loss, gold_rows, nll_weight, reduction="sequence_sum")


def tpo_loss(
    chosen: Responses,
    rejected: Responses,
    gold: Responses,
    *,
    beta: float = 0.01,
    loss_type: str = "sigmoid",
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    nll_weight: float = 1.0,
) -> Tensor:
    """Returns TPO, `-log σ(β (S⁺ - S⁻))` plus `nll_weight` times the MLE loss of a third response.

    Triple preference optimisation (Saeidi et al. 2024, arXiv 2405.16681, eq. 6), whose gold
    response is better than the chosen one; CPO with that in the likelihood. "tpo-l" is SimPO's
    margin, `-log σ(β (S̄⁺ - S̄⁻) - γ)`; "hinge" and "ipo" as in `cpo_loss`. The defaults are trl's.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> tpo_loss(chosen, rejected, chosen, beta=0.1)
        tensor(1.0082)

    Args:
        chosen (Responses): as in `dpo_loss`.
        rejected (Responses): as in `dpo_loss`.
        gold (Responses): the responses of the MLE loss, token mean; any number of them.
        beta (float): > 0.
        loss_type (str): as above.
        gamma (float): γ >= 0 of "tpo-l".
        label_smoothing (float): as in `cpo_loss`; also for "tpo-l".
        nll_weight (float): >= 0; trl's `tpo_alpha`.

    Returns:
        Tensor: as `dpo_loss`.

    Raises:
        TypeError, ValueError: as `dpo_loss`.
    """
    one_of("loss_type", loss_type, TPO_LOSS_TYPES)
    pairs = pairs_of(chosen, rejected, both=True)
    if loss_type == "tpo-l":
        loss = _of_means(pairs, beta, gamma, label_smoothing)
    else:
        loss = _preference(pairs, beta, loss_type, label_smoothing)
    return _with_likelihood(loss, _imitated(pairs, gold), nll_weight)


def _of_means(pairs: Pairs, beta: float, gamma: float, label_smoothing: float) -> Tensor:
    """Returns SimPO's loss of checked pairs."""
    share = smoothing_of(label_smoothing)
    gap = number("beta", beta, positive=True) * pairs.logps(mean=True).gap
    return pairs.mean(logistic(gap - number("gamma", gamma), share))


def _preference(pairs: Pairs, beta: float, loss_type: str, label_smoothing: float) -> Tensor:
    """Returns the loss of the margin of log-probabilities, or of their token means for "ipo"."""
    beta = number("beta", beta, positive=True)
    share = smoothing_of(label_smoothing)
    if share and loss_type != "sigmoid":
        raise ValueError(f"label_smoothing: expected 0 for {loss_type}, got {share}")
    gap = pairs.logps(mean=loss_type == "ipo").gap
    if loss_type == "ipo":
        return pairs.mean((gap - 1 / (2 * beta)).square())
    u = beta * gap
    return pairs.mean(torch.relu(1 - u) if loss_type == "hinge" else logistic(u, share))


def _imitated(pairs: Pairs, gold: Responses | None) -> Rows:
    """Returns the rows of the likelihood: the chosen ones, already there, or checked gold ones.

    Converted once, so that gradients of log-odds in bfloat16 are rounded once.
    """
    return pairs.chosen if gold is None else checked("gold", gold)


def _with_likelihood(
    loss: Tensor, gold: Rows, nll_weight: float, *, reduction: str = "token_mean"
) -> Tensor:
    """Adds the MLE loss of responses, which is not computed at a weight of 0."""
    weight = number("nll_weight", nll_weight)
    if weight == 0:
        return loss
    return loss - weight * gold.reduced(F.logsigmoid(gold.log_odds), reduction)
