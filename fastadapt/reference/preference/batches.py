"""References of what looks at a batch: sorted margins, lists of responses, weights of pairs."""

import torch
from torch import Tensor

from fastadapt.reference.preference.pairs import log_ratios, preferred, there
from fastadapt.reference.responses import (
    Side,
    dtype_of,
    each,
    log_of,
    probabilities,
    sequences,
    stacked,
    zero,
)


def aot_loss(
    chosen: Side,
    rejected: Side,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ld_alpha: float | None = None,
) -> Tensor:
    """Reference of `fastadapt.losses.aot_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.aot_loss(chosen, rejected)
        tensor(0.5981)
    """
    upper, lower = [], []
    for i, g, b in there(chosen, rejected):
        good, bad = log_ratios(i, g, b, (None, None), ld_alpha)
        upper.append(good - bad)
        refs = [0.0 if x is None else float(x[i]) for x in (ref_chosen_logps, ref_rejected_logps)]
        lower.append(torch.tensor(refs[0] - refs[1], dtype=torch.float64))
    return sorted_mean(chosen, upper, lower, beta, label_smoothing)


def aot_unpaired_loss(
    chosen: Side,
    rejected: Side,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ld_alpha: float | None = None,
) -> Tensor:
    """Reference of `fastadapt.losses.aot_unpaired_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.aot_unpaired_loss(chosen, rejected)
        tensor(0.5981)
    """
    refs = (ref_chosen_logps, ref_rejected_logps)
    found = [log_ratios(i, g, b, refs, ld_alpha) for i, g, b in there(chosen, rejected)]
    upper, lower = [good for good, _ in found], [bad for _, bad in found]
    return sorted_mean(chosen, upper, lower, beta, label_smoothing)


def rrhf_loss(responses: Side, scores: Tensor, lists: Tensor) -> Tensor:
    """Reference of `fastadapt.losses.rrhf_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.ones(3, 2, dtype=torch.bool)
        >>> responses = Responses(torch.tensor([[0.0, 2.0], [1.0, 1.0], [0.0, -2.0]]), mask)
        >>> reference.rrhf_loss(responses, torch.tensor([0.9, 0.1, 0.4]), torch.tensor([0, 0, 0]))
        tensor(2.0136)
    """
    total, count = zero(responses), 0
    all_of_them = each(responses)
    for name in lists.unique().tolist():
        own = [i for i, m in enumerate(all_of_them) if lists[i] == name and len(m)]
        if not own:
            continue
        count += 1
        logs = {i: log_of(*probabilities(all_of_them[i])) for i in own}
        for i in own:
            for j in own:
                ahead = logs[i].mean() - logs[j].mean()
                if scores[i] < scores[j] and ahead > 0:
                    total = total + ahead
        total = total - logs[max(own, key=lambda i: float(scores[i]))].sum()
    divisor = max(count, 1) if responses.total_sequences is None else sequences(responses)
    return (total / divisor).to(dtype_of(responses.log_odds))


def wpo_weights(
    chosen: Side,
    rejected: Side,
    chosen_log_sum_squares: Tensor,
    rejected_log_sum_squares: Tensor,
) -> Tensor:
    """Reference of `fastadapt.losses.wpo_weights`.

    Examples:
        >>> from fastadapt import reference
        >>> hidden, head = torch.ones(1, 2, 4), torch.zeros(3, 4)
        >>> labels = torch.tensor([[1, 2]])
        >>> m, squares = linear_log_odds(hidden, head, labels, outputs=["sum_of_squares"])
        >>> chosen = Responses.from_labels(m, labels)
        >>> reference.wpo_weights(chosen, chosen, squares.log(), squares.log())
        tensor([1.0000], dtype=torch.float64)
    """
    sides = ((chosen, chosen_log_sum_squares), (rejected, rejected_log_sum_squares))
    product = torch.ones(len(each(chosen)), dtype=torch.float64, device=chosen.log_odds.device)
    for side, squares in sides:
        for i, (m, log) in enumerate(zip(each(side), each(side, squares), strict=True)):
            if len(m):
                alike = probabilities(m)[0].detach() / log.detach().exp()
                product[i] *= alike.log().mean().exp()
    return product


def desensitized_logps(chosen: Side, rejected: Side, ld_alpha: float) -> tuple[Tensor, Tensor]:
    """Reference of `fastadapt.losses.desensitized_logps`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.zeros(1, 2), mask)
        >>> rejected = Responses(torch.zeros(1, 2), torch.tensor([[True, False]]))
        >>> reference.desensitized_logps(chosen, rejected, 0.5)
        (tensor([-1.0397], dtype=torch.float64), tensor([-0.6931], dtype=torch.float64))
    """
    sides = zip(each(chosen), each(rejected), strict=True)
    found = [log_ratios(i, g, b, (None, None), ld_alpha) for i, (g, b) in enumerate(sides)]
    chosen_logps = stacked([good for good, _ in found], chosen.log_odds)
    return chosen_logps, stacked([bad for _, bad in found], rejected.log_odds)


def sorted_mean(
    chosen: Side, upper: list[Tensor], lower: list[Tensor], beta: float, smoothing: float
) -> Tensor:
    """Returns the smoothed logistic loss of two sorted lists against each other."""
    total = zero(chosen)
    for high, low in zip(sorted(upper, key=_value), sorted(lower, key=_value), strict=True):
        right, swapped = preferred(beta * (high - low))
        total = total - (1 - smoothing) * right.log() - smoothing * swapped.log()
    divisor = max(len(upper), 1) if chosen.total_sequences is None else sequences(chosen)
    return (total / divisor).to(dtype_of(chosen.log_odds))


def _value(x: Tensor) -> float:
    """Returns what a number is sorted by."""
    return float(x.detach())
