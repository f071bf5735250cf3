"""Losses of several responses to one prompt with scores: RRHF."""

import torch
from torch import Tensor

from fastadapt.losses.responses import Responses
from fastadapt.losses.rows import Rows, checked, per_response


def rrhf_loss(responses: Responses, scores: Tensor, lists: Tensor) -> Tensor:
    """Returns RRHF, the ranking and likelihood loss of lists of responses with scores.

    Over the lists, the mean of `Σ_{s_i < s_j} max(0, S̄_i - S̄_j) - S_best` (Yuan et al. 2023,
    arXiv 2304.05302, eq. 2 to 4), S̄ the mean log-probability of a token. ∂L/∂S̄_i is the number of
    better responses that are less likely minus that of worse ones that are more likely. It is no
    part of mixtures, whose sides are two.

    Examples:
        >>> mask = torch.ones(3, 2, dtype=torch.bool)
        >>> responses = Responses(torch.tensor([[0.0, 2.0], [1.0, 1.0], [0.0, -2.0]]), mask)
        >>> rrhf_loss(responses, torch.tensor([0.9, 0.1, 0.4]), torch.tensor([0, 0, 0]))
        tensor(2.0136)

    Args:
        responses (Responses): B responses of all lists; see there for layouts, dtypes and divisors.
            `total_sequences` is the number of lists.
        scores (Tensor): (B,), a float dtype: the larger, the better. Equal ones are not compared;
            of several best ones the first is the one to imitate.
        lists (Tensor): (B,), int64, in [0, B): which list each response is of, in any order.

    Returns:
        Tensor: a scalar, float32 (float64 for float64 log-odds), nats; 0 with a graph if no token
        counts. A response without tokens is in no list.

    Raises:
        TypeError, ValueError: as `mle_loss`; scores or lists that do not fit.
    """
    rows = checked("responses", responses)
    values = per_response("scores", scores, rows)
    ids = _list_ids(lists, rows)
    means, there = rows.logps(mean=True), rows.lengths > 0
    together = (ids[:, None] == ids) & there[:, None] & there
    worse = together & (values[:, None] < values)
    ranking = torch.where(worse, torch.relu(means[:, None] - means), 0).sum()
    # the best of a list: none of it is better, nor equal and before it
    at = torch.arange(rows.size, device=ids.device)
    ahead = worse | (together & (values[:, None] == values) & (at < at[:, None]))
    best = there & ~ahead.any(-1)
    total = ranking - torch.where(best, rows.logps(), 0).sum()
    count = best.sum().clamp(min=1) if responses.total_sequences is None else rows.sequences
    return (total / count).to(rows.dtype)


def _list_ids(lists: Tensor, rows: Rows) -> Tensor:
    """Checks the lists of the responses."""
    if not isinstance(lists, Tensor) or lists.dtype != torch.int64:
        got = lists.dtype if isinstance(lists, Tensor) else type(lists).__name__
        raise TypeError(f"lists: expected a tensor of torch.int64, got {got}")
    if lists.shape != (rows.size,):
        raise ValueError(f"lists: expected ({rows.size},), got {tuple(lists.shape)}")
    return lists.to(rows.log_odds.device)
