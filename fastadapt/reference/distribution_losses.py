"""References of the losses that look at whole distributions: float64, row after row.

Those of labels' log-odds are in `losses.py`.
"""

from typing import Any

import torch
from torch import Tensor

Side = Any  # a fastadapt.Responses, or anything with its attributes


def z_loss(chosen: Side, logsumexp: Tensor, *, reduction: str = "token_mean") -> Tensor:
    """Reference of `fastadapt.z_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> chosen = Responses(torch.zeros(1, 2), torch.tensor([[True, True]]))
        >>> reference.z_loss(chosen, torch.tensor([[1.0, 3.0]]))
        tensor(5.)
    """
    return _reduced(chosen, logsumexp, lambda i: logsumexp[i].double() ** 2, reduction)


def entropy_bonus(chosen: Side, entropy: Tensor, *, reduction: str = "token_mean") -> Tensor:
    """Reference of `fastadapt.entropy_bonus`.

    Examples:
        >>> from fastadapt import reference
        >>> chosen = Responses(torch.zeros(1, 2), torch.tensor([[True, True]]))
        >>> reference.entropy_bonus(chosen, torch.tensor([[1.0, 3.0]]))
        tensor(-2.)
    """
    return _reduced(chosen, entropy, lambda i: -entropy[i].double(), reduction)


def smoothed_mle_loss(
    chosen: Side,
    logsumexp: Tensor,
    mean_logits: Tensor,
    *,
    label_smoothing: float = 0.1,
    reduction: str = "token_mean",
) -> Tensor:
    """Reference of `fastadapt.smoothed_mle_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> chosen = Responses(torch.zeros(1, 1), torch.tensor([[True]]))
        >>> lse, mean = torch.tensor([[1.0]]), torch.tensor([[0.0]])
        >>> reference.smoothed_mle_loss(chosen, lse, mean, label_smoothing=0.5)
        tensor(0.8466)
    """

    def row(i: Any) -> Tensor:
        spread = logsumexp[i].double() - mean_logits[i].double()
        logp = _odds_to_p(chosen.log_odds[i]).log()
        return -(1 - label_smoothing) * logp + label_smoothing * spread

    return _reduced(chosen, logsumexp, row, reduction)


def previous_tokens(
    labels: Tensor, *, ignore_index: int = -100, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Reference of `fastadapt.previous_tokens`: the same sets, in other places.

    Examples:
        >>> from fastadapt import reference
        >>> index, mask = reference.previous_tokens(torch.tensor([[5, 7, 5]]))
        >>> index[0, 2][mask[0, 2]]
        tensor([7])
    """
    b, t = labels.shape
    k = t if window is None else min(window, t)
    index, mask = labels.new_zeros(b, t, k), torch.zeros(b, t, k, dtype=torch.bool)
    for row, ids in enumerate(labels.tolist()):
        for at, label in enumerate(ids):
            earlier = ids[max(at - k, 0) : at] if label != ignore_index else []
            for place, c in enumerate(sorted(set(earlier) - {label, ignore_index})):
                index[row, at, place], mask[row, at, place] = c, True
    return index, mask.to(labels.device)


def repeated_ngrams(
    labels: Tensor, n: int = 4, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Reference of `fastadapt.repeated_ngrams`: the same sets, in other places.

    Examples:
        >>> from fastadapt import reference
        >>> index, mask = reference.repeated_ngrams(torch.tensor([[5, 7, 5, 8]]), n=2)
        >>> index[0, 3][mask[0, 3]]
        tensor([7])
    """
    b, t = labels.shape
    index, mask = labels.new_zeros(b, t, t), torch.zeros(b, t, t, dtype=torch.bool)
    for row, ids in enumerate(labels.tolist()):
        for at, label in enumerate(ids):
            before = ids[at - n + 1 : at] if at >= n - 1 else [ignore_index]
            seen = {ids[s] for s in range(n - 1, at) if ids[s - n + 1 : s] == before}
            if ignore_index in [label, *before]:
                seen = set()
            for place, c in enumerate(sorted(seen - {label, ignore_index})):
                index[row, at, place], mask[row, at, place] = c, True
    return index, mask.to(labels.device)


def top_k_divergence(
    chosen: Side,
    candidates: Tensor,
    candidate_mask: Tensor,
    set_log_odds: Tensor,
    teacher_logps: Tensor,
    *,
    teacher_set_log_odds: Tensor | None = None,
    kind: str = "kl",
    reduction: str = "token_mean",
) -> Tensor:
    """Reference of `fastadapt.top_k_divergence`.

    Examples:
        >>> from fastadapt import reference
        >>> chosen = Responses(torch.zeros(1, 1), torch.tensor([[True]]))
        >>> of_each, of_set = torch.zeros(1, 1, 1), torch.zeros(1, 1)
        >>> mask, teacher = torch.ones(1, 1, 1, dtype=torch.bool), torch.tensor([[[0.25]]]).log()
        >>> reference.top_k_divergence(chosen, of_each, mask, of_set, teacher)
        tensor(0.1308)
    """

    def row(i: Any) -> Tensor:
        there = candidate_mask[i]
        if not there.any():
            return set_log_odds[i].double() * 0
        p = _odds_to_p(candidates[i][there])
        q = teacher_logps[i][there].double().exp()
        q = torch.where(q > 1 + 1e-2, float("nan"), q)
        p_tail = _odds_to_p(-set_log_odds[i])
        if teacher_set_log_odds is None:
            own = torch.finfo(teacher_logps.dtype).eps
            wide = torch.finfo(torch.promote_types(teacher_logps.dtype, torch.float32)).eps
            known = 4 * wide - own * (q[q > 0] * q[q > 0].log()).sum()  # to so much
            q_tail = 1 - q.sum()
            if q_tail <= known:
                q_tail = known if kind == "reverse_kl" else q_tail * 0
        else:
            q_tail = _odds_to_p(-teacher_set_log_odds[i])
        distributions = torch.cat([q, q_tail[None]]), torch.cat([p, p_tail[None]])
        first, second = distributions if kind == "kl" else distributions[::-1]
        some = first != 0
        return (first[some] * (first[some].log() - second[some].log())).sum()

    return _reduced(chosen, set_log_odds, row, reduction)


def _odds_to_p(m: Tensor) -> Tensor:
    """Returns probabilities, float64."""
    m = m.double()
    return torch.stack([m, torch.zeros_like(m)]).softmax(0)[0]


def _reduced(side: Side, like: Tensor, row: Any, reduction: str) -> Tensor:
    """Sums `row` over the tokens that count, response after response, and divides."""
    counted = side.mask if side.segments is None else side.segments >= 0
    total = like.flatten()[:0].double().sum()
    for i in counted.nonzero().tolist():
        total = total + row(tuple(i))
    if reduction == "token_mean":
        count = float(counted.sum()) if side.total_tokens is None else float(side.total_tokens)
    elif side.total_sequences is not None:
        count = float(side.total_sequences)
    elif side.segments is None:
        count = float(counted.any(-1).sum())
    else:
        count = float(len(set(side.segments[counted].tolist())))
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return (total / max(count, 1.0)).to(dtype)
