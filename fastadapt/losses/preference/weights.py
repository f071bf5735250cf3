"""Weights of pairs, and of the tokens in them, for the losses with a reference.

Notation as in `rows.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.losses.responses import Responses
from fastadapt.losses.rows import Rows, pairs_of, per_token


def wpo_weights(
    chosen: Responses,
    rejected: Responses,
    chosen_log_sum_squares: Tensor,
    rejected_log_sum_squares: Tensor,
) -> Tensor:
    """Returns WPO's weights of pairs, how much a pair is like what the policy would write.

    `exp(mean_t (l_t - log Σ_j p_tj²))` of a response, times that of the other (Zhou et al. 2024,
    arXiv 2406.11827, eq. 2, with the alignment of sampled tokens): the `pair_weights` of the losses
    with a reference. In (0, 1/Σp²] each, so that they may exceed 1.

    Examples:
        >>> hidden, head = torch.ones(1, 2, 4), torch.zeros(3, 4)
        >>> labels = torch.tensor([[1, 2]])
        >>> m, squares = linear_log_odds(hidden, head, labels, outputs=["sum_of_squares"])
        >>> chosen = Responses.from_labels(m, labels)
        >>> wpo_weights(chosen, chosen, squares.log(), squares.log())  # three equal tokens
        tensor([1.0000], dtype=torch.float64)

    Args:
        chosen (Responses): as in `dpo_loss`.
        rejected (Responses): as in `dpo_loss`.
        chosen_log_sum_squares (Tensor): log Σ_j p_tj² of each row, the shape of the chosen
            log-odds: the logarithm of `linear_log_odds(..., outputs=["sum_of_squares"])`.
        rejected_log_sum_squares (Tensor): the same for `rejected`.

    Returns:
        Tensor: (B,), float64, without a gradient.

    Raises:
        TypeError, ValueError: as `dpo_loss`; numbers that do not fit the rows.
    """
    pairs = pairs_of(chosen, rejected)
    of_chosen = _likeness("chosen", chosen, pairs.chosen, chosen_log_sum_squares)
    of_rejected = _likeness("rejected", rejected, pairs.rejected, rejected_log_sum_squares)
    return torch.exp(of_chosen + of_rejected).detach()


def desensitized_logps(
    chosen: Responses, rejected: Responses, ld_alpha: float
) -> tuple[Tensor, Tensor]:
    """Returns log P of both sides as LD-DPO counts it, for the reference of `ld_alpha=`.

    Tokens beyond the shorter response's length count α times (Liu et al. 2024, arXiv 2409.06411).

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.zeros(1, 2), mask)
        >>> rejected = Responses(torch.zeros(1, 2), torch.tensor([[True, False]]))
        >>> desensitized_logps(chosen, rejected, 0.5)
        (tensor([-1.0397], dtype=torch.float64), tensor([-0.6931], dtype=torch.float64))

    Args:
        chosen (Responses): as in `dpo_loss`.
        rejected (Responses): as in `dpo_loss`.
        ld_alpha (float): α in [0, 1].

    Returns:
        tuple[Tensor, Tensor]: (B,) each, float64, nats.

    Raises:
        TypeError, ValueError: as `dpo_loss`.
    """
    found = pairs_of(chosen, rejected).logps(ld_alpha=ld_alpha)
    return found.chosen, found.rejected


def _likeness(name: str, side: Responses, rows: Rows, squares: Tensor) -> Tensor:
    """Returns mean_t (l_t - log Σ p²) of each response, (B,)."""
    given = per_token(f"{name}_log_sum_squares", squares, side, rows)
    return rows.totals(F.logsigmoid(rows.log_odds) - given, mean=True)
