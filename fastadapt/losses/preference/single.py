"""Losses of single responses, good or bad, against a reference: KTO, APO-zero unpaired, BCO.

Notation as in `rows.py`. The two sides may have any numbers of responses, none included; the mean
is over those of both.
"""

import torch
from torch import Tensor

from fastadapt._ops.checks import number
from fastadapt.losses.responses import Responses
from fastadapt.losses.rows import (
    Rows,
    checked,
    reference,
    references,
    scalar,
    total_is_given,
)
from fastadapt.losses.scores import Sides, logistic, probability


def kto_loss(
    chosen: Responses,
    rejected: Responses,
    reference_point: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Returns KTO, the mean of `λ⁺ σ(-β (r⁺ - z))` and `λ⁻ σ(β (r⁻ - z))`, z the reference point.

    Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7. Per response ∂L/∂S⁺ = -λ⁺ β σ(x) σ(-x), x = β
    (r⁺ - z), and with the other sign ∂L/∂S⁻: it fades at both ends.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> kto_loss(chosen, rejected, torch.tensor(0.0))
        tensor(0.4752)

    Args:
        chosen (Responses): the good responses; see there for layouts and dtypes. The mean divides
            by the sum of both sides' `total_sequences`, by default the responses with any token.
        rejected (Responses): the bad ones, any number of them.
        reference_point (Tensor): z, one value >= 0, nats, as of `kto_reference_point`, held
            constant; or a number.
        ref_chosen_logps (Tensor | None): as in `dpo_loss`.
        ref_rejected_logps (Tensor | None): as in `dpo_loss`.
        beta (float): > 0.
        desirable_weight (float): λ⁺ >= 0.
        undesirable_weight (float): λ⁻ >= 0.

    Returns:
        Tensor: as `dpo_loss`.

    Raises:
        TypeError, ValueError: as `dpo_loss`, for any numbers of responses.
    """
    sides = _Singles(chosen, rejected)
    z = scalar("reference_point", reference_point, sides.chosen)
    beta = number("beta", beta, positive=True)
    good, bad = (beta * (r - z) for r in sides.ratios(ref_chosen_logps, ref_rejected_logps))
    up, down = (
        number("desirable_weight", desirable_weight),
        number("undesirable_weight", undesirable_weight),
    )
    return sides.mean(up * probability(-good), down * probability(bad))


def kto_reference_point(mismatched: Responses, ref_logps: Tensor | None = None) -> Tensor:
    """Returns z of KTO: max(0, mean of r) over responses that belong to other prompts.

    An estimate of KL(policy || reference) (Ethayarajh et al. 2024, arXiv 2402.01306, section 4.1):
    prompt i with the completion of prompt i + 1, one forward more of each model, without a
    gradient. On several devices average the means before the maximum.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> mismatched = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> kto_reference_point(mismatched, torch.tensor([-4.0]))
        tensor(1.1799)

    Args:
        mismatched (Responses): (B,) responses under other responses' prompts.
        ref_logps (Tensor | None): (B,), their `sequence_logps` under the reference.

    Returns:
        Tensor: a scalar >= 0, float32 (float64 for float64 log-odds), nats, without a gradient; 0
        if no token counts.

    Raises:
        TypeError, ValueError: as `sequence_logps`; reference log-probabilities that do not fit.
    """
    rows = checked("mismatched", mismatched)
    ratios = rows.logps() - reference("ref_logps", rows, ref_logps)
    return rows.sequence_mean(ratios).clamp(min=0).detach()


def apo_zero_unpaired_loss(
    chosen: Responses,
    rejected: Responses,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Returns APO-zero of single responses: KTO with a reference point of 0.

    The unpaired form of `apo_zero_loss` (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7), with
    no forward more. Arguments as `kto_loss`.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> apo_zero_unpaired_loss(chosen, rejected)
        tensor(0.4752)
    """
    return kto_loss(
        chosen,
        rejected,
        torch.zeros(()),
        ref_chosen_logps,
        ref_rejected_logps,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )


def bco_loss(
    chosen: Responses,
    rejected: Responses,
    reward_shift: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Returns BCO, the mean of `-log σ(βr⁺ - δ)` and `-log σ(δ - βr⁻)`, δ the shift of the rewards.

    Jung et al. 2024, arXiv 2404.04656, eq. 12, without the matching of the prompts' distributions.
    Per response ∂L/∂S⁺ = -β σ(δ - βr⁺), ∂L/∂S⁻ = β σ(βr⁻ - δ).

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> bco_loss(chosen, rejected, torch.tensor(-0.2))
        tensor(0.6444)

    Args:
        chosen (Responses): as in `kto_loss`.
        rejected (Responses): as in `kto_loss`.
        reward_shift (Tensor): δ, one value of either sign, held constant: a running mean of the
            rewards βr of both sides; or a number.
        ref_chosen_logps (Tensor | None): as in `dpo_loss`.
        ref_rejected_logps (Tensor | None): as in `dpo_loss`.
        beta (float): > 0.

    Returns:
        Tensor: as `kto_loss`.

    Raises:
        TypeError, ValueError: as `kto_loss`.
    """
    sides = _Singles(chosen, rejected)
    shift = scalar("reward_shift", reward_shift, sides.chosen)
    beta = number("beta", beta, positive=True)
    ratios = sides.ratios(ref_chosen_logps, ref_rejected_logps)
    return sides.mean(
        logistic(beta * ratios.chosen - shift), logistic(shift - beta * ratios.rejected)
    )


class _Singles:
    """Checked responses of two sides that are no pairs."""

    def __init__(self, chosen: Responses, rejected: Responses) -> None:
        self.chosen, self.rejected = checked("chosen", chosen), checked("rejected", rejected)
        if total_is_given(chosen, rejected):
            good, bad = (torch.as_tensor(side.total_sequences) for side in (chosen, rejected))
            both = good + bad
        else:
            both = _there(self.chosen).sum() + _there(self.rejected).sum()
        self._count = both.to(self.chosen.log_odds.device).clamp(min=1)

    def ratios(self, ref_chosen_logps: Tensor | None, ref_rejected_logps: Tensor | None) -> Sides:
        """Returns r of both sides, S without a reference."""
        good, bad = self.chosen, self.rejected
        constant = references(good, bad, ref_chosen_logps, ref_rejected_logps)
        return Sides(good.logps() - constant.chosen, bad.logps() - constant.rejected)

    def mean(self, of_chosen: Tensor, of_rejected: Tensor) -> Tensor:
        """Returns the mean of the losses of all responses."""
        sides = ((self.chosen, of_chosen), (self.rejected, of_rejected))
        total = torch.stack([torch.where(_there(rows), x, 0).sum() for rows, x in sides]).sum()
        return (total / self._count).to(self.chosen.dtype)


def _there(rows: Rows) -> Tensor:
    """Which responses have tokens, (B,)."""
    return rows.lengths > 0
