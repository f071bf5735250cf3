"""Losses of the two rewards of a pair, not of their difference alone; and those with a term beside.

Notation as in `rows.py`: β r is the reward of a response. Such a loss can say where each of the
two shall be, and not only how far apart.
"""

import torch
from torch import Tensor

from fastadapt._ops.checks import number, one_of
from fastadapt.losses.responses import Responses
from fastadapt.losses.rows import Pairs, Rows, pairs_of, per_token
from fastadapt.losses.scores import Sides, logistic, probability

TDPO_VARIANTS = ("tdpo1", "tdpo2")


def nca_pair_loss(
    chosen: Responses,
    rejected: Responses,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    ld_alpha: float | None = None,
) -> Tensor:
    """Returns NCA of pairs, `-log σ(βr⁺) - ½ log σ(-βr⁺) - ½ log σ(-βr⁻)`.

    Chen et al. 2024, arXiv 2402.05369, table 2. Per pair ∂L/∂S⁺ = -β [σ(-βr⁺) - ½ σ(βr⁺)], which
    vanishes at βr⁺ = log 2, and ∂L/∂S⁻ = ½ β σ(βr⁻). Arguments as `dpo_loss`.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> nca_pair_loss(chosen, rejected)
        tensor(1.3425)
    """
    pairs, rewards = _rewards(
        chosen, rejected, ref_chosen_logps, ref_rejected_logps, beta, ld_alpha
    )
    of_both = logistic(-rewards.chosen) + logistic(-rewards.rejected)
    return pairs.mean(logistic(rewards.chosen) + of_both / 2, pair_weights)


def bco_pair_loss(
    chosen: Responses,
    rejected: Responses,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    ld_alpha: float | None = None,
) -> Tensor:
    """Returns `-log σ(βr⁺) - log σ(-βr⁻)`: a classifier of chosen against rejected responses.

    "bco_pair" of trl: BCO (Jung et al. 2024, arXiv 2404.04656, eq. 12) without its shift of the
    rewards, which `bco_loss` has. Per pair ∂L/∂S⁺ = -β σ(-βr⁺), ∂L/∂S⁻ = β σ(βr⁻). Arguments as
    `dpo_loss`.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> bco_pair_loss(chosen, rejected)
        tensor(1.2970)
    """
    pairs, rewards = _rewards(
        chosen, rejected, ref_chosen_logps, ref_rejected_logps, beta, ld_alpha
    )
    return pairs.mean(logistic(rewards.chosen) + logistic(-rewards.rejected), pair_weights)


def sppo_hard_loss(
    chosen: Responses,
    rejected: Responses,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    ld_alpha: float | None = None,
) -> Tensor:
    """Returns SPPO of pairs, `(r⁺ - 1/(2β))² + (r⁻ + 1/(2β))²`.

    Wu et al. 2024, arXiv 2405.00675, eq. 4.7, with a win probability of 1 for the chosen response
    and 0 for the rejected one; 1/β is its η. Per pair ∂L/∂S⁺ = 2 (r⁺ - 1/(2β)), ∂L/∂S⁻ = 2 (r⁻ +
    1/(2β)). Arguments as `dpo_loss`.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> sppo_hard_loss(chosen, rejected, beta=0.5)
        tensor(6.6253)
    """
    beta = number("beta", beta, positive=True)
    pairs, ratios = _rewards(chosen, rejected, ref_chosen_logps, ref_rejected_logps, 1.0, ld_alpha)
    goal = 1 / (2 * beta)
    losses = (ratios.chosen - goal).square() + (ratios.rejected + goal).square()
    return pairs.mean(losses, pair_weights)


def apo_zero_loss(
    chosen: Responses,
    rejected: Responses,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    ld_alpha: float | None = None,
) -> Tensor:
    """Returns APO-zero, `σ(-βr⁺) + σ(βr⁻)`: up with the chosen, down with the rejected response.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7, for chosen responses that are better than
    the model's own. Per pair ∂L/∂S⁺ = -β σ(βr⁺) σ(-βr⁺), ∂L/∂S⁻ = β σ(βr⁻) σ(-βr⁻). Arguments as
    `dpo_loss`.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> apo_zero_loss(chosen, rejected)
        tensor(0.9505)
    """
    pairs, rewards = _rewards(
        chosen, rejected, ref_chosen_logps, ref_rejected_logps, beta, ld_alpha
    )
    losses = probability(-rewards.chosen) + probability(rewards.rejected)
    return pairs.mean(losses, pair_weights)


def apo_down_loss(
    chosen: Responses,
    rejected: Responses,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    ld_alpha: float | None = None,
) -> Tensor:
    """Returns APO-down, `σ(βr⁺) + σ(-u)`: down with both, and more with the rejected response.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8, for chosen responses that are worse than the
    model's own. Per pair ∂L/∂S⁺ = β [σ(βr⁺) σ(-βr⁺) - σ(u) σ(-u)], ∂L/∂S⁻ = β σ(u) σ(-u).
    Arguments as `dpo_loss`.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> apo_down_loss(chosen, rejected)
        tensor(0.9297)
    """
    pairs, rewards = _rewards(
        chosen, rejected, ref_chosen_logps, ref_rejected_logps, beta, ld_alpha
    )
    losses = probability(rewards.chosen) + probability(-rewards.gap)
    return pairs.mean(losses, pair_weights)


def cal_dpo_loss(
    chosen: Responses,
    rejected: Responses,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    ld_alpha: float | None = None,
) -> Tensor:
    """Returns Cal-DPO, `-log σ(Δ) + (r⁺ - 1/(2β))² + (r⁻ + 1/(2β))²`.

    Xiao et al. 2024, arXiv 2412.14516: DPO's term, without β, and SPPO's squares, which hold the
    two rewards at ±½. Per pair ∂L/∂S⁺ = -σ(-Δ) + 2 (r⁺ - 1/(2β)), ∂L/∂S⁻ = σ(-Δ) + 2 (r⁻ +
    1/(2β)). Arguments as `dpo_loss`.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> cal_dpo_loss(chosen, rejected, beta=0.5)
        tensor(6.7523)
    """
    beta = number("beta", beta, positive=True)
    pairs, ratios = _rewards(chosen, rejected, ref_chosen_logps, ref_rejected_logps, 1.0, ld_alpha)
    goal = 1 / (2 * beta)
    squares = (ratios.chosen - goal).square() + (ratios.rejected + goal).square()
    return pairs.mean(logistic(ratios.gap) + squares, pair_weights)


def dpop_loss(
    chosen: Responses,
    rejected: Responses,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    dpop_lambda: float = 50.0,
    ld_alpha: float | None = None,
) -> Tensor:
    """Returns DPO-positive, `-log σ(v)` with v = β [r⁺ - r⁻ - λ max(0, -r⁺)].

    Smaug (Pal et al. 2024, arXiv 2402.13228, eq. 3): a chosen response that falls below the
    reference costs λ times more. Per pair ∂L/∂S⁺ = -β σ(-v) (1 + λ [r⁺ < 0]), ∂L/∂S⁻ = β σ(-v).
    Arguments as `dpo_loss`.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> dpop_loss(chosen, rejected, dpop_lambda=5.0)
        tensor(0.8037)
    """
    beta, factor = number("beta", beta, positive=True), number("dpop_lambda", dpop_lambda)
    pairs, ratios = _rewards(chosen, rejected, ref_chosen_logps, ref_rejected_logps, 1.0, ld_alpha)
    short = torch.relu(-ratios.chosen)
    return pairs.mean(logistic(beta * (ratios.gap - factor * short)), pair_weights)


def tdpo_loss(
    chosen: Responses,
    rejected: Responses,
    chosen_divergences: Tensor,
    rejected_divergences: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    tdpo_alpha: float = 0.5,
    variant: str = "tdpo2",
) -> Tensor:
    """Returns TDPO, `-log σ(β [Δ - α (D⁻ - D⁺)])`, D = Σ_t KL(reference || policy) of a response.

    Zeng et al. 2024, arXiv 2404.11999: "tdpo2" (eq. 17) holds D⁺ constant, "tdpo1" (eq. 15) has
    α = 1 and does not. Per pair ∂L/∂S⁺ = -β σ(-v), and ∂L/∂D⁻ = α β σ(-v). The rows of KL come from
    `linear_divergence`, with a gradient, so that both heads' logits stay unheld.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> kl = torch.tensor([[0.5, 0.1]])
        >>> tdpo_loss(chosen, rejected, kl, 3 * kl)
        tensor(0.6256)

    Args:
        chosen (Responses): as in `dpo_loss`.
        rejected (Responses): as in `dpo_loss`.
        chosen_divergences (Tensor): KL(reference || policy) at each token, the shape of the chosen
            log-odds, a float dtype, nats.
        rejected_divergences (Tensor): the same for `rejected`.
        ref_chosen_logps (Tensor | None): as in `dpo_loss`.
        ref_rejected_logps (Tensor | None): as in `dpo_loss`.
        beta (float): > 0.
        tdpo_alpha (float): α >= 0 of "tdpo2".
        variant (str): as above.

    Returns:
        Tensor: as `dpo_loss`.

    Raises:
        TypeError, ValueError: as `dpo_loss`; divergences that do not fit the rows.
    """
    one_of("variant", variant, TDPO_VARIANTS)
    alpha = number("tdpo_alpha", tdpo_alpha)
    pairs, ratios = _rewards(chosen, rejected, ref_chosen_logps, ref_rejected_logps, 1.0, None)
    above = Sides(
        _summed("chosen_divergences", chosen_divergences, chosen, pairs.chosen),
        _summed("rejected_divergences", rejected_divergences, rejected, pairs.rejected),
    )
    if variant == "tdpo2":
        gap = ratios.gap - alpha * (above.rejected - above.chosen.detach())
    else:
        gap = ratios.gap + above.gap
    return pairs.mean(logistic(number("beta", beta, positive=True) * gap))


def _rewards(
    chosen: Responses,
    rejected: Responses,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    beta: float,
    ld_alpha: float | None,
) -> tuple[Pairs, Sides]:
    """Returns the checked pairs and β r of both sides."""
    beta = number("beta", beta, positive=True)
    pairs = pairs_of(chosen, rejected)
    ratios = pairs.ratios(ref_chosen_logps, ref_rejected_logps, ld_alpha)
    return pairs, Sides(*(beta * r for r in ratios))


def _summed(name: str, value: Tensor, side: Responses, rows: Rows) -> Tensor:
    """Returns the sum over each response of one number a token."""
    return rows.sum(per_token(name, value, side, rows))
