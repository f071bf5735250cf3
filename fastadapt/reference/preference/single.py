"""References of the losses of single responses, good or bad."""

from collections.abc import Callable

from torch import Tensor

from fastadapt.reference.preference.pairs import Refs, preferred
from fastadapt.reference.responses import (
    Side,
    dtype_of,
    each,
    log_of,
    probabilities,
    sequences,
    zero,
)


def kto_loss(
    chosen: Side,
    rejected: Side,
    reference_point: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Reference of `fastadapt.losses.kto_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.kto_loss(chosen, rejected, torch.tensor(0.0))
        tensor(0.4752)
    """
    z = float(reference_point)

    def good(r: Tensor) -> Tensor:
        return desirable_weight * preferred(beta * (r - z))[1]

    def bad(r: Tensor) -> Tensor:
        return undesirable_weight * preferred(beta * (r - z))[0]

    return single_mean(chosen, rejected, (ref_chosen_logps, ref_rejected_logps), good, bad)


def kto_reference_point(mismatched: Side, ref_logps: Tensor | None = None) -> Tensor:
    """Reference of `fastadapt.losses.kto_reference_point`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> mismatched = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.kto_reference_point(mismatched, torch.tensor([-4.0]))
        tensor(1.1799)
    """
    total = zero(mismatched)
    for i, m in enumerate(each(mismatched)):
        if len(m):
            total = total + log_ratio(i, m, ref_logps)
    mean = (total / sequences(mismatched)).detach()
    return mean.clamp(min=0).to(dtype_of(mismatched.log_odds))


def apo_zero_unpaired_loss(
    chosen: Side,
    rejected: Side,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Reference of `fastadapt.losses.apo_zero_unpaired_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.apo_zero_unpaired_loss(chosen, rejected)
        tensor(0.4752)
    """

    def good(r: Tensor) -> Tensor:
        return desirable_weight * preferred(beta * r)[1]

    def bad(r: Tensor) -> Tensor:
        return undesirable_weight * preferred(beta * r)[0]

    return single_mean(chosen, rejected, (ref_chosen_logps, ref_rejected_logps), good, bad)


def bco_loss(
    chosen: Side,
    rejected: Side,
    reward_shift: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Reference of `fastadapt.losses.bco_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.bco_loss(chosen, rejected, torch.tensor(-0.2))
        tensor(0.6444)
    """
    shift = float(reward_shift)

    def good(r: Tensor) -> Tensor:
        return -preferred(beta * r - shift)[0].log()

    def bad(r: Tensor) -> Tensor:
        return -preferred(beta * r - shift)[1].log()

    return single_mean(chosen, rejected, (ref_chosen_logps, ref_rejected_logps), good, bad)


def log_ratio(i: int, m: Tensor, ref_logps: Tensor | None) -> Tensor:
    """Returns log P less that of the reference."""
    return log_of(*probabilities(m)).sum() - (0.0 if ref_logps is None else float(ref_logps[i]))


def single_mean(
    chosen: Side,
    rejected: Side,
    refs: Refs,
    good: Callable[[Tensor], Tensor],
    bad: Callable[[Tensor], Tensor],
) -> Tensor:
    """Returns the mean over the responses of both sides of functions of their log-ratios."""
    total, count = zero(chosen) + zero(rejected), 0
    for side, ref, loss in ((chosen, refs[0], good), (rejected, refs[1], bad)):
        for i, m in enumerate(each(side)):
            if len(m):
                total, count = total + loss(log_ratio(i, m, ref)), count + 1
    if chosen.total_sequences is not None:
        count = int(chosen.total_sequences) + int(rejected.total_sequences)
    return (total / max(count, 1)).to(dtype_of(chosen.log_odds))
