"""Terms beside a likelihood that look at all logits: log-sum-exp, entropy, mean.

Each takes one number a label token from `linear_log_odds(..., outputs=...)`, or from logits, and
reduces as `mle_loss` does. Notation as in `formulas.py`; lse_t is the log-sum-exp of a row's logits
z, V their number and p = softmax(z).
"""

import torch.nn.functional as F
from torch import Tensor

from fastadapt._ops.checks import number, one_of
from fastadapt.losses.responses import Responses
from fastadapt.losses.rows import REDUCTIONS, checked, per_token


def z_loss(chosen: Responses, logsumexp: Tensor, *, reduction: str = "token_mean") -> Tensor:
    """Returns the square of the logits' log-sum-exp, which keeps their normaliser near 1.

    `(1/N) Σ_t lse_t²` (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, section 5, with a coefficient
    of 1e-4; `lse_square_scale` in Liger). ∂/∂z = 2 lse p / N.

    Examples:
        >>> hidden, head = torch.ones(1, 2, 4), torch.zeros(3, 4)
        >>> labels = torch.tensor([[1, -100]])
        >>> log_odds, lse = linear_log_odds(hidden, head, labels, outputs=["logsumexp"])
        >>> chosen = Responses.from_labels(log_odds, labels)
        >>> z_loss(chosen, lse)
        tensor(1.2069)
        >>> loss = mle_loss(chosen) + 1e-4 * z_loss(chosen, lse)

    Args:
        chosen (Responses): says which rows count and what the mean divides by; its log-odds are not
            read.
        logsumexp (Tensor): lse_t, the shape of the log-odds, float32, float64, bfloat16 or float16,
            nats; that of `linear_log_odds(..., outputs=("logsumexp",))` has a gradient.
        reduction (str): "token_mean", or "sequence_sum": the mean over responses of their sums.

    Returns:
        Tensor: a scalar >= 0, float32 (float64 for float64 inputs), squared nats; 0 with a graph if
        no token counts.

    Raises:
        TypeError, ValueError: as `mle_loss`; numbers that do not fit the rows.
    """
    one_of("reduction", reduction, REDUCTIONS)
    rows = checked("chosen", chosen)
    return rows.reduced(per_token("logsumexp", logsumexp, chosen, rows).square(), reduction)


def entropy_bonus(chosen: Responses, entropy: Tensor, *, reduction: str = "token_mean") -> Tensor:
    """Returns minus the entropy of the next-token distributions: a loss that rewards uncertainty.

    `-(1/N) Σ_t H_t`, the bonus of policy gradients (Williams & Peng 1991; Mnih et al. 2016, arXiv
    1602.01783, section 4), also beside GRPO: add it with a positive coefficient.
    ∂/∂z_j = p_j (log p_j + H) / N.

    Examples:
        >>> hidden, head = torch.ones(1, 2, 4), torch.zeros(3, 4)
        >>> labels = torch.tensor([[1, -100]])
        >>> log_odds, entropy = linear_log_odds(hidden, head, labels, outputs=["entropy"])
        >>> chosen = Responses.from_labels(log_odds, labels)
        >>> entropy_bonus(chosen, entropy)
        tensor(-1.0986)
        >>> loss = mle_loss(chosen) + 0.01 * entropy_bonus(chosen, entropy)

    Args:
        chosen (Responses): as in `z_loss`.
        entropy (Tensor): H_t, as `logsumexp` there, nats; that of `linear_log_odds(...,
            outputs=("entropy",))` has a gradient, and all digits where it is near 0.
        reduction (str): as in `z_loss`.

    Returns:
        Tensor: a scalar <= 0, float32 (float64 for float64 inputs), nats; 0 with a graph if no
        token counts.

    Raises:
        TypeError, ValueError: as `z_loss`.
    """
    one_of("reduction", reduction, REDUCTIONS)
    rows = checked("chosen", chosen)
    return -rows.reduced(per_token("entropy", entropy, chosen, rows), reduction)


def smoothed_mle_loss(
    chosen: Responses,
    logsumexp: Tensor,
    mean_logits: Tensor,
    *,
    label_smoothing: float = 0.1,
    reduction: str = "token_mean",
) -> Tensor:
    """Returns the likelihood loss with a share of every label spread over all ids.

    `(1/N) Σ_t [-(1-ε) l_t + ε (lse_t - mean_j z_tj)]` with ε the label smoothing (Szegedy et al.
    2016, arXiv 1512.00567, section 7); equals torch's `cross_entropy(label_smoothing=ε)`.
    ∂/∂z = (p - (1-ε) onehot(y) - ε/V) / N. The mean logit of a head without a cap needs no logits:
    `logit_scale * (hidden @ weight.mean(0) + bias.mean())`.

    Examples:
        >>> hidden, head = torch.ones(1, 2, 4), torch.eye(3, 4)
        >>> labels = torch.tensor([[1, -100]])
        >>> log_odds, lse = linear_log_odds(hidden, head, labels, outputs=["logsumexp"])
        >>> chosen = Responses.from_labels(log_odds, labels)
        >>> smoothed_mle_loss(chosen, lse, hidden @ head.mean(0), label_smoothing=0.1)
        tensor(1.0986)

    Args:
        chosen (Responses): the label tokens; see there for layouts, dtypes and divisors.
        logsumexp (Tensor): as in `z_loss`.
        mean_logits (Tensor): the mean over the vocabulary of each row's logits, as `logsumexp`.
        label_smoothing (float): ε in [0, 1].
        reduction (str): as in `z_loss`.

    Returns:
        Tensor: a scalar, float32 (float64 for float64 inputs), nats; 0 with a graph if no token
        counts. Infinite if an id has a logit of -inf and ε > 0.

    Raises:
        TypeError, ValueError: as `z_loss`; ε out of its range.
    """
    one_of("reduction", reduction, REDUCTIONS)
    share = number("label_smoothing", label_smoothing)
    if share > 1:
        raise ValueError(f"label_smoothing: expected a value in [0, 1], got {share}")
    rows = checked("chosen", chosen)
    lse = per_token("logsumexp", logsumexp, chosen, rows)
    spread = lse - per_token("mean_logits", mean_logits, chosen, rows)
    loss = -(1 - share) * F.logsigmoid(rows.log_odds)
    return rows.reduced(loss + share * spread if share else loss, reduction)
