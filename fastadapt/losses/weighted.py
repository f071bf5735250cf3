"""Likelihood losses that weigh their tokens.

Notation as in `formulas.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt._ops.checks import number, one_of
from fastadapt.losses.responses import Responses
from fastadapt.losses.rows import REDUCTIONS, checked


def focal_mle_loss(
    chosen: Responses, *, focal_gamma: float = 2.0, reduction: str = "token_mean"
) -> Tensor:
    """Returns the focal loss, `(1/N) Σ_t -(1 - p_t)^γ l_t`: MLE that leaves out what is learnt.

    Lin et al. 2017, arXiv 1708.02002, eq. 4. g = -[(1-p)^(γ+1) - γ p (1-p)^γ l]/N, which fades as
    (1-p)^(γ+1) where MLE's fades as 1-p.

    Examples:
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), torch.tensor([[True, True]]))
        >>> focal_mle_loss(chosen)
        tensor(0.0875)

    Args:
        chosen (Responses): see there for layouts, dtypes and divisors.
        focal_gamma (float): γ >= 0; 0 is MLE.
        reduction (str): as in `mle_loss`.

    Returns:
        Tensor: as `mle_loss`.

    Raises:
        TypeError, ValueError: as `mle_loss`.
    """
    one_of("reduction", reduction, REDUCTIONS)
    gamma = number("focal_gamma", focal_gamma)
    rows = checked("chosen", chosen)
    weights = torch.exp(gamma * F.logsigmoid(-rows.log_odds))
    return -rows.reduced(weights * F.logsigmoid(rows.log_odds), reduction)


def dft_loss(chosen: Responses, *, reduction: str = "token_mean") -> Tensor:
    """Returns DFT, `(1/N) Σ_t -sg(p_t) l_t`: MLE whose gradient is that of the probability.

    Dynamic fine-tuning (Wu et al. 2025, arXiv 2508.05629, eq. 9; "dft" in trl's SFT): sg holds p
    constant. g = -p (1-p)/N, that of `-p`: unlikely tokens are not learnt.

    Examples:
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), torch.tensor([[True, True]]))
        >>> dft_loss(chosen)
        tensor(0.2292)

    Args:
        chosen (Responses): see there for layouts, dtypes and divisors.
        reduction (str): as in `mle_loss`.

    Returns:
        Tensor: as `mle_loss`.

    Raises:
        TypeError, ValueError: as `mle_loss`.
    """
    one_of("reduction", reduction, REDUCTIONS)
    rows = checked("chosen", chosen)
    logps = F.logsigmoid(rows.log_odds)
    return -rows.reduced(logps.exp().detach() * logps, reduction)
