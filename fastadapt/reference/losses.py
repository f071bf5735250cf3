"""References of the losses: float64 probabilities, one response after another, plain loops.

Nothing here is written for speed or for lower precision: log-odds become the two
probabilities `softmax([m, 0])`, that of the label and that of all else, which neither rounds to 1.
"""

from typing import Any

import torch
from torch import Tensor

Side = Any  # a fastadapt.Responses, or anything with its attributes


def label_logps(log_odds: Tensor) -> Tensor:
    """Reference of `fastadapt.label_logps`.

    Examples:
        >>> from fastadapt import reference
        >>> reference.label_logps(torch.tensor([0.0, 2.0]))
        tensor([-0.6931, -0.1269])
    """
    return _log(*_probabilities(log_odds)).to(_dtype(log_odds))


def sequence_logps(responses: Side) -> Tensor:
    """Reference of `fastadapt.sequence_logps`.

    Examples:
        >>> from fastadapt import reference
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), torch.tensor([[True, True]]))
        >>> reference.sequence_logps(chosen)
        tensor([-0.8201])
    """
    sums = [_log(*_probabilities(m)).sum() for m in _each(responses)]
    return _stack(sums, responses.log_odds).to(_dtype(responses.log_odds))


def mle_loss(chosen: Side, *, reduction: str = "token_mean") -> Tensor:
    """Reference of `fastadapt.mle_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), torch.tensor([[True, True]]))
        >>> reference.mle_loss(chosen)
        tensor(0.4100)
    """
    total = sum((-_log(*_probabilities(m)).sum() for m in _each(chosen)), _zero(chosen))
    divisor = {"token_mean": _tokens, "sequence_sum": _sequences}[reduction](chosen)
    return (total / divisor).to(_dtype(chosen.log_odds))


def unlikelihood_penalty(rejected: Side, *, level: str = "token") -> Tensor:
    """Reference of `fastadapt.unlikelihood_penalty`.

    Examples:
        >>> from fastadapt import reference
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), torch.tensor([[True, True]]))
        >>> reference.unlikelihood_penalty(rejected)
        tensor(0.4100)
    """
    total = _zero(rejected)
    for m in _each(rejected):
        p, rest = _probabilities(m)
        if level == "token":
            total = total - rest.log().sum()
        elif level == "sequence":
            total = total - _miss(p, rest).log()
        elif len(m):
            total = total - torch.log(-torch.expm1(_log(p, rest).sum() / len(m)))
    return (total / (_tokens if level == "token" else _sequences)(rejected)).to(
        _dtype(rejected.log_odds)
    )


def candidate_unlikelihood_penalty(
    chosen: Side, candidates: Tensor, candidate_mask: Tensor
) -> Tensor:
    """Reference of `fastadapt.candidate_unlikelihood_penalty`.

    Examples:
        >>> from fastadapt import reference
        >>> chosen = Responses(torch.zeros(1, 2), torch.tensor([[True, True]]))
        >>> candidates = torch.tensor([[[-1.0, -2.0], [-3.0, 0.0]]])
        >>> there = torch.tensor([[[True, True], [True, False]]])
        >>> reference.candidate_unlikelihood_penalty(chosen, candidates, there)
        tensor(0.2444)
    """
    counted = chosen.mask if chosen.segments is None else chosen.segments >= 0
    total = _zero(chosen)
    for row, mask in zip(candidates[counted], candidate_mask[counted], strict=True):
        for m in row[mask]:
            total = total - _probabilities(m)[1].log()
    return (total / _tokens(chosen)).to(_dtype(chosen.log_odds))


def exmate_penalty(rejected: Side, *, norm: str = "sequence_mean") -> Tensor:
    """Reference of `fastadapt.exmate_penalty`.

    Examples:
        >>> from fastadapt import reference
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), torch.tensor([[True, True]]))
        >>> reference.exmate_penalty(rejected)
        tensor(0.2441)
    """
    total, product, count = _zero(rejected), _zero(rejected) + 1, _tokens(rejected)
    for m in _each(rejected):
        p = _probabilities(m)[0]
        if norm == "token":
            total = total + p.sum() / count
        elif norm == "batch_token_mean":
            product = product * (p ** (1 / count)).prod()
        elif len(m):
            power = 1 / len(m) if norm == "sequence_mean" else 1.0
            total = total + (p**power).prod() / _sequences(rejected)
    if norm == "batch_token_mean" and any(len(m) for m in _each(rejected)):
        total = product
    return total.to(_dtype(rejected.log_odds))


def mate_penalty(rejected: Side) -> Tensor:
    """Reference of `fastadapt.mate_penalty`.

    Examples:
        >>> from fastadapt import reference
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), torch.tensor([[True, True]]))
        >>> reference.mate_penalty(rejected)
        tensor(-1.4100)
    """
    return -mle_loss(rejected)


def unlikelihood_loss(
    chosen: Side, rejected: Side, *, coefficient: float = 1.0, level: str = "token"
) -> Tensor:
    """Reference of `fastadapt.unlikelihood_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.unlikelihood_loss(chosen, rejected, coefficient=0.5)
        tensor(0.6151)
    """
    return mle_loss(chosen) + coefficient * unlikelihood_penalty(rejected, level=level)


def exmate_loss(
    chosen: Side, rejected: Side, *, coefficient: float = 1.0, norm: str = "sequence_mean"
) -> Tensor:
    """Reference of `fastadapt.exmate_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.exmate_loss(chosen, rejected)
        tensor(0.6542)
    """
    return mle_loss(chosen) + coefficient * exmate_penalty(rejected, norm=norm)


def mate_loss(chosen: Side, rejected: Side, *, coefficient: float = 1.0) -> Tensor:
    """Reference of `fastadapt.mate_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.mate_loss(chosen, rejected)
        tensor(-1.)
    """
    return mle_loss(chosen) + coefficient * mate_penalty(rejected)


def dpo_loss(
    chosen: Side,
    rejected: Side,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
) -> Tensor:
    """Reference of `fastadapt.dpo_loss`: the odds of a pair as a quotient of probabilities.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.dpo_loss(chosen, rejected, beta=0.1)
        tensor(0.5981)
    """
    total, pairs, eps = _zero(chosen), 0, label_smoothing
    for i, (g, b) in enumerate(zip(_each(chosen), _each(rejected), strict=True)):
        if not len(g) + len(b):
            continue
        pairs += 1
        ratios = []
        for m, ref in ((g, ref_chosen_logps), (b, ref_rejected_logps)):
            ratio = _log(*_probabilities(m)).sum() - (0.0 if ref is None else float(ref[i]))
            ratios.append(ratio / max(len(m), 1) if length_normalized else ratio)
        gap = ratios[0] - ratios[1]
        preferred = torch.stack([beta * gap, torch.zeros_like(gap)]).softmax(0)
        if loss_type == "hinge":
            total = total + max(1 - beta * gap, 0 * gap)
        elif loss_type == "ipo":
            total = total + (gap - 0.5 / beta) ** 2
        elif loss_type == "sigmoid":
            total = total - (1 - eps) * preferred[0].log() - eps * preferred[1].log()
        else:
            clean = -(1 - eps) * preferred[0].log() + eps * preferred[1].log()
            total = total + clean / (1 - 2 * eps)
    divisor = max(pairs, 1) if chosen.total_sequences is None else _sequences(chosen)
    return (total / divisor).to(_dtype(chosen.log_odds))


def _dtype(log_odds: Tensor) -> torch.dtype:
    """Returns the dtype of the results."""
    return torch.float64 if log_odds.dtype == torch.float64 else torch.float32


def _probabilities(log_odds: Tensor) -> tuple[Tensor, Tensor]:
    """Returns p and 1 - p."""
    p, rest = torch.stack([log_odds.double(), torch.zeros_like(log_odds.double())]).softmax(0)
    return p, rest


def _log(p: Tensor, rest: Tensor) -> Tensor:
    """Returns log p, from 1 - p where p is near 1."""
    return torch.where(p > 0.5, torch.log1p(-rest.clamp(max=0.75)), p.log())


def _miss(p: Tensor, rest: Tensor) -> Tensor:
    """Returns 1 - Π p as the probability of missing some token: (1-p_1) + p_1 (1-p_2) + ..."""
    before = torch.cat([p.new_ones(1), p.cumprod(0)])[: len(p)]
    return (before * rest).sum() if len(p) else p.new_ones(())


def _each(side: Side) -> list[Tensor]:
    """Returns the log-odds of each response, in the order of its tokens."""
    if side.segments is None:
        return [m[kept] for m, kept in zip(side.log_odds, side.mask, strict=True)]
    size = side.num_segments
    if size is None:
        size = max([1, *(1 + side.segments).tolist()])
    return [side.log_odds[side.segments == i] for i in range(size)]


def _tokens(side: Side) -> float:
    """Returns the divisor of a mean over tokens."""
    count = sum(map(len, _each(side))) if side.total_tokens is None else side.total_tokens
    return max(float(count), 1.0)


def _sequences(side: Side) -> float:
    """Returns the divisor of a mean over responses."""
    count = side.total_sequences
    return max(float(sum(len(m) > 0 for m in _each(side)) if count is None else count), 1.0)


def _zero(side: Side) -> Tensor:
    """Returns 0 with a graph."""
    log_odds: Tensor = side.log_odds
    return log_odds.flatten()[:0].double().sum()


def _stack(values: list[Tensor], like: Tensor) -> Tensor:
    """Stacks values to (B,), also for B = 0."""
    return torch.stack(values) if values else like.new_zeros(0)
