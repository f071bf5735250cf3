"""Several ids a row: the candidates of token unlikelihood, and distillation from a teacher's top K.

Notation as in `formulas.py`. A row's candidates c have log-odds m_c, so that log p_c = log σ(m_c),
and together those of their set, m_S, so that the mass of all other ids, the tail, has log(1-P) =
log σ(-m_S): with all its digits, where 1 - Σ_c p_c has none left from P = 1 - 1e-7 on in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt._ops.checks import integer, one_of
from fastadapt.losses.formulas import check_candidates
from fastadapt.losses.responses import Responses
from fastadapt.losses.rows import REDUCTIONS, checked, per_token
from fastadapt.losses.shapes import accumulated, beside, labels_in_rows

DIVERGENCES = ("kl", "reverse_kl")


def previous_tokens(
    labels: Tensor, *, ignore_index: int = -100, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the earlier tokens of each position: what token unlikelihood makes less likely.

    C_t = {y_1, ..., y_{t-1}} without y_t, the previous context of Welleck et al. 2020 (arXiv
    1908.04319): each earlier token of the same sequence once, and never the label. Their code takes
    those of earlier sequences of the batch too. The objective is `mle_loss(chosen) + α
    candidate_unlikelihood_penalty(chosen, candidates, mask)`, with the candidates' log-odds from
    `linear_candidate_log_odds` or `candidate_log_odds`.

    Examples:
        >>> labels = torch.tensor([[5, 7, 5, 2]])
        >>> index, mask = previous_tokens(labels)
        >>> [index[0, t][mask[0, t]].tolist() for t in range(4)]
        [[], [5], [7], [7, 5]]
        >>> candidates = candidate_log_odds(torch.zeros(1, 4, 9), index, mask)
        >>> chosen = Responses.from_labels(torch.zeros(1, 4, 9), labels)
        >>> loss = mle_loss(chosen) + candidate_unlikelihood_penalty(chosen, candidates, mask)

    Args:
        labels (Tensor): (B, T), int64, the token to score at each position. Those of a prompt are
            candidates too if they are there; whether their rows count is said by `Responses`.
        ignore_index (int): labels that are no candidates and have none, such as padding.
        window (int | None): how many positions to look back. None: all.

    Returns:
        tuple[Tensor, Tensor]: (B, T, K), K the lesser of `window` and T: ids, int64, and which of
        them are candidates, bool; 0 in the place of `ignore_index`.

    Raises:
        TypeError: labels that are no int64, a window that is no integer.
        ValueError: another shape, a window below 1.
    """
    labels_in_rows(labels)
    ignore_index = integer("ignore_index", ignore_index)
    t = labels.shape[1]
    k = t if window is None else min(integer("window", window, 1), t)
    at = torch.arange(t, device=labels.device)
    back = torch.arange(k, 0, -1, device=labels.device)
    places = at[:, None] - back if window is not None else at.expand(t, t)  # (T, K)
    there = (places >= 0) & (places < at[:, None])
    places = places.clamp(min=0)
    index = labels[:, places.flatten()].view(len(labels), t, k)
    # an earlier token counts where it was last, and no longer where it is the label
    last = _next_places(labels)[:, places.flatten()].view(index.shape) > at[:, None]
    ignored = labels == ignore_index
    known = index != ignore_index
    return torch.where(known, index, 0), there & last & known & ~ignored[..., None]


def top_k_divergence(
    chosen: Responses,
    candidates: Tensor,
    candidate_mask: Tensor,
    set_log_odds: Tensor,
    teacher_logps: Tensor,
    *,
    teacher_set_log_odds: Tensor | None = None,
    kind: str = "kl",
    reduction: str = "token_mean",
) -> Tensor:
    """Returns a student's divergence from a teacher of which K log-probabilities a row are known.

    Of K + 1 events, the K ids and the tail, all other ids together: with q_c the teacher's
    probabilities, Q their sum, and P that of the student's p_c,

    - "kl": KL(q || p) = Σ_c q_c ln(q_c / p_c) + (1-Q) ln((1-Q) / (1-P)). ∂/∂z = p - q on the ids,
      and p_j (Q-P) / (1-P) on an id j of the tail.
    - "reverse_kl": KL(p || q), the two exchanged.

    A lower bound of the divergence over all ids, and 0 where the K + 1 agree: the distillation of
    Hinton et al. 2015 (arXiv 1503.02531) with the tail bucket of trl's server distillation
    (`loss_add_tail`). The student's tail comes from the log-odds of the set, and the teacher's from
    its own where they are given: exact whatever is left, as at Q = 1 - 1e-12.

    Examples:
        >>> hidden, head = torch.ones(1, 2, 4), torch.zeros(5, 4)
        >>> index = torch.tensor([[[0, 3], [1, 2]]])
        >>> student = linear_candidate_log_odds(hidden, head, index, outputs=["set_log_odds"])
        >>> labels = torch.tensor([[3, -100]])
        >>> chosen = Responses.from_labels(student[1], labels)  # the rows that count
        >>> teacher_logps = torch.tensor([[[0.5, 0.25], [0.1, 0.1]]]).log()
        >>> mask = torch.ones_like(index, dtype=torch.bool)
        >>> top_k_divergence(chosen, student[0], mask, student[1], teacher_logps)
        tensor(0.2951)

    Args:
        chosen (Responses): says which rows count and what the mean divides by; its log-odds are not
            read.
        candidates (Tensor): m_c of the student, (B, T, K) or (N, K), float32, float64, bfloat16 or
            float16, nats; as `candidate_mask`, `set_log_odds` and their ids they are those of one
            call of `linear_candidate_log_odds`.
        candidate_mask (Tensor): the same shape, bool; the candidates there are, no id twice in a
            row. A row without any adds 0.
        set_log_odds (Tensor): m_S of the student, the shape of the rows.
        teacher_logps (Tensor): ln q_c, the shape of the candidates; -inf for 0. Above 0 by more
            than rounding makes the loss NaN: probabilities without their logarithm, say. The
            teacher is a constant: one that requires a gradient is refused. Of another temperature
            are the student's log-odds by `logit_scale=1 / temperature`.
        teacher_set_log_odds (Tensor | None): those of the teacher, the shape of the rows, +inf for
            a tail of 0. None: 1 - Q is the difference from 1 of the sum of q_c, made in float64,
            whose digits are those that this difference leaves. Below the rounding of the q_c,
            `4 ε + ε' Σ_c -q_c ln q_c` with ε of float32 (float64) and ε' of `teacher_logps`,
            nothing is known of it: "kl" takes it as 0, and "reverse_kl", which is large for small
            tails, as that much. Give it to "reverse_kl" where teachers are confident.
        kind (str): as above.
        reduction (str): as in `z_loss`.

    Returns:
        Tensor: a scalar, float32 (float64 for float64 inputs), nats, not negative but for rounding;
        0 with a graph if no token counts. +inf where an event has probability 0 in the second
        alone, with "reverse_kl" so where the teacher's tail is given as 0 and the student's is
        not.

    Raises:
        TypeError, ValueError: as `mle_loss`; an unknown kind, numbers that do not fit the rows, a
            teacher that requires a gradient.
    """
    one_of("kind", kind, DIVERGENCES)
    one_of("reduction", reduction, REDUCTIONS)
    rows = checked("chosen", chosen)
    check_candidates(chosen, candidates, candidate_mask)
    there = candidate_mask & rows.kept[..., None]
    some = there.any(-1)
    of_each = torch.where(there, accumulated("candidates", candidates), 0)
    of_set = torch.where(some, per_token("set_log_odds", set_log_odds, chosen, rows), 0)
    student = torch.cat([F.logsigmoid(of_each), F.logsigmoid(-of_set)[..., None]], -1)
    teacher = _teacher(chosen, teacher_logps, teacher_set_log_odds, there, kind)
    events = torch.cat([there, some[..., None]], -1)
    first, second = (teacher, student) if kind == "kl" else (student, teacher)
    return rows.reduced(torch.where(events, _terms(first, second), 0).sum(-1), reduction)


def _next_places(ids: Tensor) -> Tensor:
    """(B, T); of each id the next place in its row at which it stands, T for none."""
    values, order = ids.sort(dim=1, stable=True)
    following = torch.full_like(ids, ids.shape[1])
    following[:, :-1] = torch.where(
        values[:, 1:] == values[:, :-1], order[:, 1:], following[:, :-1]
    )
    return torch.empty_like(ids).scatter_(1, order, following)


def _teacher(
    chosen: Responses, logps: Tensor, set_log_odds: Tensor | None, there: Tensor, kind: str
) -> Tensor:
    """Returns the teacher's log-probabilities, (..., K + 1), that of the tail last."""
    named = {"teacher_logps": logps}
    if set_log_odds is not None:
        named["teacher_set_log_odds"] = set_log_odds
    for name, x in named.items():
        beside(name, x, chosen, columns=name == "teacher_logps")
        if x.requires_grad:
            raise ValueError(
                f"{name}: expected a teacher without a gradient, got requires_grad=True; detach it"
            )
    if logps.shape != there.shape:
        raise ValueError(
            f"teacher_logps: expected shape {tuple(there.shape)}, got {tuple(logps.shape)}"
        )
    own = torch.finfo(logps.dtype).eps
    logps = torch.where(there, accumulated("teacher_logps", logps), float("-inf"))
    least = 4 * torch.finfo(logps.dtype).eps
    logps = torch.where(logps > max(own, least), float("nan"), logps)
    if set_log_odds is not None:
        tail = F.logsigmoid(-accumulated("teacher_set_log_odds", set_log_odds))
    else:
        q = logps.double().exp()
        mass = 1 - q.sum(-1)
        rounding = least + own * torch.where(q > 0, q * logps.double().abs(), 0).sum(-1)
        unknown = 0.0 if kind == "kl" else rounding
        tail = torch.where(mass > rounding, mass, torch.where(mass.isnan(), mass, unknown)).log()
    return torch.cat([logps, tail.to(logps.dtype)[..., None]], -1)


def _terms(first: Tensor, second: Tensor) -> Tensor:
    """Returns a ln(a / b) of each event from ln a and ln b.

    0 where a is 0, else +inf where b is, both without a gradient.
    """
    some, never = first != float("-inf"), second == float("-inf")
    both = some & ~never
    a, b = torch.where(both, first, 0.0), torch.where(both, second, 0.0)
    return torch.where(both, a.exp() * (a - b), torch.where(some, float("inf"), 0.0))
