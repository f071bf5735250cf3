"""Likelihood of the chosen responses, penalties on the rejected ones, and their sums.

Notation: response i has T_i label tokens, token t the log-odds m_t and the probability p_t =
σ(m_t); l_t = log p_t, S_i = Σ l_t = log P_i, and S̄_i = S_i / T_i. N is the number of tokens and B
that of the responses of a side. With g_t = ∂L/∂m_t, the gradient of a row of logits is `∂L/∂z_t =
g_t (onehot(y_t) - q_t)`, q_t the softmax over the other entries, for any loss.

Sources: Welleck et al. 2020, arXiv 1908.04319, with its code, facebookresearch/
unlikelihood_training; ParlAI, projects/dialogue_unlikelihood (unlikelihood of rejected responses);
Tuan et al. 2023, arXiv 2212.10515, with its code, Pascalson/CausalDialogue `main.py` (MATE,
ExMATE). Tuan & Wang 2024, arXiv 2408.16751, compares these losses. The formulas follow the
published code: the normalisations and weights that the last two papers print have not been checked.
The gradients stated here are derived, and tested, in this package.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt._ops.checks import number, one_of
from fastadapt.losses.responses import Responses
from fastadapt.losses.rows import REDUCTIONS, checked, sequence_log_odds
from fastadapt.losses.shapes import accumulated, beside

UNLIKELIHOOD_LEVELS = ("token", "sequence", "sequence_mean")
EXMATE_NORMS = ("sequence_mean", "batch_token_mean", "sequence_sum", "token")


def mle_loss(chosen: Responses, *, reduction: str = "token_mean") -> Tensor:
    """Returns the negative log-likelihood of the chosen responses.

    - "token_mean": `-(1/N) Σ_t l_t`, the cross-entropy of language models; with
      `chosen.total_tokens`, transformers' `ForCausalLMLoss(num_items_in_batch=...)`. g = -(1-p)/N.
    - "sequence_sum": `-(1/B) Σ_i S_i`, whose sum over tokens matches that of DPO.

    Examples:
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), torch.tensor([[True, True]]))
        >>> mle_loss(chosen)
        tensor(0.4100)

    Args:
        chosen (Responses): see there for layouts, dtypes and divisors.
        reduction (str): as above.

    Returns:
        Tensor: a scalar, float32 (float64 for float64 log-odds), nats; 0 with a graph if no token
        counts. Infinite if a token has m = -inf.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices in a `Responses`, unknown option.
    """
    one_of("reduction", reduction, REDUCTIONS)
    rows = checked("chosen", chosen)
    return -rows.reduced(F.logsigmoid(rows.log_odds), reduction)


def unlikelihood_penalty(rejected: Responses, *, level: str = "token") -> Tensor:
    """Returns how likely the rejected responses are, as `-log(1 - probability)`.

    - "token": `(1/N) Σ_t -log(1 - p_t)`, as in ParlAI. g = p/N: it grows with p up to 1/N.
    - "sequence": `(1/B) Σ_i -log(1 - P_i)`. g_t = (1/B) P/(1-P) (1-p_t); Σ_t g_t <= 1/B.
    - "sequence_mean": the same of e^S̄, the geometric mean of a response's p_t.

    Exact whatever the log-odds: published code clamps 1 - p (at 1e-20 to 1e-5), which ends the
    gradient where the rejected token is most certain; unclamped, 1 - p rounds to 0 in float32 from
    m = 17.

    On a token that both sides share, in the same context, MLE and `a` times this penalty weigh
    1 - a p/(1-p): beyond p = 1/(1+a) the token is pushed down, though it is chosen too.

    Examples:
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), torch.tensor([[True, True]]))
        >>> unlikelihood_penalty(rejected)
        tensor(0.4100)

    Args:
        rejected (Responses): see there for layouts, dtypes and divisors.
        level (str): as above.

    Returns:
        Tensor: a scalar >= 0, float32 (float64 for float64 log-odds); 0 with a graph if no token
        counts.

    Raises:
        TypeError, ValueError: as `mle_loss`.
    """
    one_of("level", level, UNLIKELIHOOD_LEVELS)
    rows = checked("rejected", rejected)
    if level == "token":
        return rows.token_mean(-F.logsigmoid(-rows.log_odds))
    log_odds = sequence_log_odds(rows, mean=level == "sequence_mean")
    return rows.sequence_mean(-F.logsigmoid(-log_odds))


def candidate_unlikelihood_penalty(
    chosen: Responses, candidates: Tensor, candidate_mask: Tensor
) -> Tensor:
    """Returns the unlikelihood penalty of negative candidates beside the chosen tokens.

    `(1/N) Σ_t Σ_{c in C_t} -log(1 - p_t(c))`, token-level unlikelihood: C_t may be the previous
    tokens of the response but y_t. Added to `mle_loss(chosen)` it is Welleck et al.'s objective, as
    a mean over tokens where their code sums.

    Examples:
        >>> chosen = Responses(torch.zeros(1, 2), torch.tensor([[True, True]]))
        >>> candidates = torch.tensor([[[-1.0, -2.0], [-3.0, 0.0]]])
        >>> there = torch.tensor([[[True, True], [True, False]]])
        >>> candidate_unlikelihood_penalty(chosen, candidates, there)
        tensor(0.2444)

    Args:
        chosen (Responses): says which rows count and what the mean divides by; its log-odds are not
            read. A row without candidates still counts in the mean.
        candidates (Tensor): the log-odds of K tokens in each row, (B, T, K) or (N, K), a float
            dtype as in `Responses`.
        candidate_mask (Tensor): the same shape, bool; the candidates there are.

    Returns:
        Tensor: as `unlikelihood_penalty`.

    Raises:
        TypeError, ValueError: as `mle_loss`; candidates that do not fit the rows.
    """
    rows = checked("chosen", chosen)
    check_candidates(chosen, candidates, candidate_mask)
    # each row of candidates as one padded response, so that the same checks serve
    flat = Responses(candidates.flatten(0, -2), candidate_mask.flatten(0, -2))
    columns = checked("candidates", flat)
    penalties = columns.sum(-F.logsigmoid(-columns.log_odds))
    return rows.token_mean(penalties.view(chosen.log_odds.shape))


def exmate_penalty(rejected: Responses, *, norm: str = "sequence_mean") -> Tensor:
    """Returns the probability of the rejected responses, normalised for length.

    - "sequence_mean": `(1/B) Σ_i e^S̄_i`, each response's geometric mean of p_t. The default: it
      splits exactly over micro-batches and devices, which the published norm does not.
      g_t = (1/B) e^S̄ (1-p_t)/T.
    - "batch_token_mean": `exp((1/N) Σ_t l_t)`, one mean over all tokens of the batch, then one
      exponential: the published code. With its coefficient 0.05 (`--mate_coef`), `exmate_loss` is
      that code's loss. It cannot be split, so `rejected.total_tokens` is refused.
    - "sequence_sum": `(1/B) Σ_i P_i`, what the name says: 2e-9 for ten tokens of log p = -2, so
      that for usual lengths MLE alone is left.
    - "token": `(1/N) Σ_t p_t`.

    The weight of a response is its own probability: the penalty acts while that is large and fades.

    Examples:
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), torch.tensor([[True, True]]))
        >>> exmate_penalty(rejected)
        tensor(0.2441)

    Args:
        rejected (Responses): see there for layouts, dtypes and divisors.
        norm (str): as above.

    Returns:
        Tensor: a scalar in [0, 1], float32 (float64 for float64 log-odds); 0 with a graph if no
        token counts.

    Raises:
        TypeError, ValueError: as `mle_loss`.
    """
    one_of("norm", norm, EXMATE_NORMS)
    rows = checked("rejected", rejected)
    if norm == "token":
        # not sigmoid, whose gradient p (1 - p) has lost 1 - p near 1
        return rows.token_mean(F.logsigmoid(rows.log_odds).exp())
    if norm == "batch_token_mean":
        if rejected.total_tokens is not None:
            raise ValueError(
                "rejected.total_tokens: expected None for batch_token_mean, one mean of it"
            )
        mean = rows.sum(F.logsigmoid(rows.log_odds)).sum() / rows.tokens
        return torch.where(rows.kept.any(), mean.exp(), 0).to(rows.dtype)
    return rows.sequence_mean(rows.logps(mean=norm == "sequence_mean").exp())


def mate_penalty(rejected: Responses) -> Tensor:
    """Returns the mean log-probability of the rejected tokens, `(1/N) Σ_t l_t`, as in the code.

    Unbounded below: its weight does not fall with p, so training may run away. g = (1-p)/N.

    Examples:
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), torch.tensor([[True, True]]))
        >>> mate_penalty(rejected)
        tensor(-1.4100)

    Args:
        rejected (Responses): see there for layouts, dtypes and divisors.

    Returns:
        Tensor: a scalar <= 0, float32 (float64 for float64 log-odds); 0 with a graph if no token
        counts. -inf if a token has m = -inf.

    Raises:
        TypeError, ValueError: as `mle_loss`.
    """
    rows = checked("rejected", rejected)
    return rows.token_mean(F.logsigmoid(rows.log_odds))


def unlikelihood_loss(
    chosen: Responses, rejected: Responses, *, coefficient: float = 1.0, level: str = "token"
) -> Tensor:
    """Returns `mle_loss(chosen) + coefficient * unlikelihood_penalty(rejected, level=level)`.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> unlikelihood_loss(chosen, rejected, coefficient=0.5)
        tensor(0.6151)
    """
    coefficient = number("coefficient", coefficient)
    return mle_loss(chosen) + coefficient * unlikelihood_penalty(rejected, level=level)


def exmate_loss(
    chosen: Responses, rejected: Responses, *, coefficient: float = 1.0, norm: str = "sequence_mean"
) -> Tensor:
    """Returns `mle_loss(chosen) + coefficient * exmate_penalty(rejected, norm=norm)`.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> exmate_loss(chosen, rejected)
        tensor(0.6542)
    """
    coefficient = number("coefficient", coefficient)
    return mle_loss(chosen) + coefficient * exmate_penalty(rejected, norm=norm)


def mate_loss(chosen: Responses, rejected: Responses, *, coefficient: float = 1.0) -> Tensor:
    """Returns `mle_loss(chosen) + coefficient * mate_penalty(rejected)`; published code has 0.05.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> mate_loss(chosen, rejected)
        tensor(-1.)
    """
    coefficient = number("coefficient", coefficient)
    return mle_loss(chosen) + coefficient * mate_penalty(rejected)


def check_candidates(chosen: Responses, candidates: Tensor, candidate_mask: Tensor) -> None:
    """Raises unless candidates and their mask fit the rows of checked responses."""
    beside("candidates", candidates, chosen, columns=True)
    beside("candidate_mask", candidate_mask, chosen, columns=True)
    accumulated("candidates", candidates)
    if candidate_mask.dtype != torch.bool or candidate_mask.shape != candidates.shape:
        expected = f"torch.bool {tuple(candidates.shape)}"
        found = f"{candidate_mask.dtype} {tuple(candidate_mask.shape)}"
        raise ValueError(f"candidate_mask: expected {expected}, got {found}")
