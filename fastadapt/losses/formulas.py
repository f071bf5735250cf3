"""Likelihood of the good responses, penalties on the bad ones, and their sums.

Notation: response i has T_i label tokens, token t the margin m_t and the probability p_t = σ(m_t);
l_t = log p_t, S_i = Σ l_t = log P_i, and S̄_i = S_i / T_i. N is the number of tokens and B that of
the responses of a side. With g_t = ∂L/∂m_t, the gradient of a row of logits is
`∂L/∂z_t = g_t (onehot(y_t) - q_t)`, q_t the softmax over the other entries, for any loss.

Sources: Welleck et al. 2020, arXiv 1908.04319, with its code, facebookresearch/
unlikelihood_training; ParlAI, projects/dialogue_unlikelihood (unlikelihood of bad responses); Tuan
et al. 2023, arXiv 2212.10515, with its code, Pascalson/CausalDialogue `main.py` (MATE, ExMATE).
Tuan & Wang 2024, arXiv 2408.16751, compares these losses. The formulas follow the published code:
the normalisations and weights that the last two papers print have not been checked. The gradients
stated here are derived, and tested, in this package.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.losses.options import number, one_of
from fastadapt.losses.responses import Responses, Rows, accumulated, checked

MLE_REDUCTIONS = ("token_mean", "sequence_sum")
UNLIKELIHOOD_LEVELS = ("token", "sequence", "sequence_mean")
EXMATE_NORMS = ("sequence_mean", "batch_token_mean", "sequence_sum", "token")


def mle_loss(good: Responses, *, reduction: str = "token_mean") -> Tensor:
    """Returns the negative log-likelihood of the good responses.

    - "token_mean": `-(1/N) Σ_t l_t`, the cross-entropy of language models; with
      `good.total_tokens`, transformers' `ForCausalLMLoss(num_items_in_batch=...)`. g = -(1-p)/N.
    - "sequence_sum": `-(1/B) Σ_i S_i`, whose sum over tokens matches that of DPO.

    Examples:
        >>> good = Responses(torch.tensor([[0.0, 2.0]]), torch.tensor([[True, True]]))
        >>> mle_loss(good)
        tensor(0.4100)

    Args:
        good (Responses): see there for layouts, dtypes and divisors.
        reduction (str): as above.

    Returns:
        Tensor: a scalar, float32 (float64 for float64 margins), nats; 0 with a graph if no token
        counts. Infinite if a token has m = -inf.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices in a `Responses`, unknown option.
    """
    one_of("reduction", reduction, MLE_REDUCTIONS)
    rows = checked("good", good)
    if reduction == "token_mean":
        return -rows.token_mean(F.logsigmoid(rows.margins))
    return -rows.sequence_mean(rows.logps())


def unlikelihood_penalty(bad: Responses, *, level: str = "token") -> Tensor:
    """Returns how likely the bad responses are, as `-log(1 - probability)`.

    - "token": `(1/N) Σ_t -log(1 - p_t)`, as in ParlAI. g = p/N: it grows with p up to 1/N.
    - "sequence": `(1/B) Σ_i -log(1 - P_i)`. g_t = (1/B) P/(1-P) (1-p_t); Σ_t g_t <= 1/B.
    - "sequence_mean": the same of e^S̄, the geometric mean of a response's p_t.

    Exact for every margin: published code clamps 1 - p (at 1e-20 to 1e-5), which ends the gradient
    where the bad token is most certain; unclamped, 1 - p rounds to 0 in float32 from m = 17.

    On a token that both sides share, in the same context, MLE and `a` times this penalty weigh
    1 - a p/(1-p): beyond p = 1/(1+a) the token is pushed down, though it is good too.

    Examples:
        >>> bad = Responses(torch.tensor([[0.0, -2.0]]), torch.tensor([[True, True]]))
        >>> unlikelihood_penalty(bad)
        tensor(0.4100)

    Args:
        bad (Responses): see there for layouts, dtypes and divisors.
        level (str): as above.

    Returns:
        Tensor: a scalar >= 0, float32 (float64 for float64 margins); 0 with a graph if no token
        counts.

    Raises:
        TypeError, ValueError: as `mle_loss`.
    """
    one_of("level", level, UNLIKELIHOOD_LEVELS)
    rows = checked("bad", bad)
    if level == "token":
        return rows.token_mean(-F.logsigmoid(-rows.margins))
    log_odds = _sequence_margins(rows, mean=level == "sequence_mean")
    return rows.sequence_mean(-F.logsigmoid(-log_odds))


def candidate_unlikelihood_penalty(
    good: Responses, candidates: Tensor, candidate_mask: Tensor
) -> Tensor:
    """Returns the unlikelihood of negative candidates in the rows of the good responses.

    `(1/N) Σ_t Σ_{c in C_t} -log(1 - p_t(c))`, token-level unlikelihood: C_t may be the previous
    tokens of the response but y_t. Added to `mle_loss(good)` it is Welleck et al.'s objective, as
    a mean over tokens where their code sums.

    Examples:
        >>> good = Responses(torch.zeros(1, 2), torch.tensor([[True, True]]))
        >>> candidates = torch.tensor([[[-1.0, -2.0], [-3.0, 0.0]]])
        >>> there = torch.tensor([[[True, True], [True, False]]])
        >>> candidate_unlikelihood_penalty(good, candidates, there)
        tensor(0.2444)

    Args:
        good (Responses): says which rows count and what the mean divides by; its margins are not
            read. A row without candidates still counts in the mean.
        candidates (Tensor): the margins of K tokens in each row, (B, T, K) or (N, K), a float dtype
            as in `Responses`.
        candidate_mask (Tensor): the same shape, bool; the candidates there are.

    Returns:
        Tensor: as `unlikelihood_penalty`.

    Raises:
        TypeError, ValueError: as `mle_loss`; candidates that do not fit the rows.
    """
    rows = checked("good", good)
    shape = (*good.margins.shape, "K")
    for name, value in (("candidates", candidates), ("candidate_mask", candidate_mask)):
        if not isinstance(value, Tensor) or value.shape[:-1] != good.margins.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: expected shape {shape}, got {got}")
        if value.device != good.margins.device:
            raise ValueError(f"{name}: expected device {good.margins.device}, got {value.device}")
    accumulated("candidates", candidates)
    if candidate_mask.dtype != torch.bool or candidate_mask.shape != candidates.shape:
        expected = f"torch.bool {tuple(candidates.shape)}"
        found = f"{candidate_mask.dtype} {tuple(candidate_mask.shape)}"
        raise ValueError(f"candidate_mask: expected {expected}, got {found}")
    # each row of candidates as one padded response, so that the same checks serve
    flat = Responses(candidates.flatten(0, -2), candidate_mask.flatten(0, -2))
    columns = checked("candidates", flat)
    penalties = columns.sum(-F.logsigmoid(-columns.margins))
    return rows.token_mean(penalties.view(good.margins.shape))


def exmate_penalty(bad: Responses, *, norm: str = "sequence_mean") -> Tensor:
    """Returns the probability of the bad responses, by a norm that keeps it from vanishing.

    - "sequence_mean": `(1/B) Σ_i e^S̄_i`, each response's geometric mean of p_t. The default: it
      splits exactly over micro-batches and devices, which the published norm does not.
      g_t = (1/B) e^S̄ (1-p_t)/T.
    - "batch_token_mean": `exp((1/N) Σ_t l_t)`, one mean over all tokens of the batch, then one
      exponential: the published code. With its coefficient 0.05 (`--mate_coef`), `exmate_loss` is
      that code's loss. It cannot be split, so `bad.total_tokens` is refused.
    - "sequence_sum": `(1/B) Σ_i P_i`, what the name says: 2e-9 for ten tokens of log p = -2, so
      that for usual lengths MLE alone is left.
    - "token": `(1/N) Σ_t p_t`.

    The weight of a response is its own probability: the penalty acts while that is large and fades.

    Examples:
        >>> bad = Responses(torch.tensor([[0.0, -2.0]]), torch.tensor([[True, True]]))
        >>> exmate_penalty(bad)
        tensor(0.2441)

    Args:
        bad (Responses): see there for layouts, dtypes and divisors.
        norm (str): as above.

    Returns:
        Tensor: a scalar in [0, 1], float32 (float64 for float64 margins); 0 with a graph if no
        token counts.

    Raises:
        TypeError, ValueError: as `mle_loss`.
    """
    one_of("norm", norm, EXMATE_NORMS)
    rows = checked("bad", bad)
    if norm == "token":
        # not sigmoid, whose gradient p (1 - p) has lost 1 - p
        return rows.token_mean(F.logsigmoid(rows.margins).exp())
    if norm == "batch_token_mean":
        if bad.total_tokens is not None:
            raise ValueError("bad.total_tokens: expected None for batch_token_mean, one mean of it")
        some = rows.kept.any()
        return torch.where(some, rows.token_mean(F.logsigmoid(rows.margins)).exp(), 0)
    return rows.sequence_mean(rows.logps(mean=norm == "sequence_mean").exp())


def mate_penalty(bad: Responses) -> Tensor:
    """Returns the mean log-probability of the bad tokens, `(1/N) Σ_t l_t`, as in the code.

    Unbounded below: its weight does not fall with p, so training may run away. g = (1-p)/N.

    Examples:
        >>> bad = Responses(torch.tensor([[0.0, -2.0]]), torch.tensor([[True, True]]))
        >>> mate_penalty(bad)
        tensor(-1.4100)

    Args:
        bad (Responses): see there for layouts, dtypes and divisors.

    Returns:
        Tensor: a scalar <= 0, float32 (float64 for float64 margins); 0 with a graph if no token
        counts. -inf if a token has m = -inf.

    Raises:
        TypeError, ValueError: as `mle_loss`.
    """
    rows = checked("bad", bad)
    return rows.token_mean(F.logsigmoid(rows.margins))


def unlikelihood_loss(
    good: Responses, bad: Responses, *, coefficient: float = 1.0, level: str = "token"
) -> Tensor:
    """Returns `mle_loss(good) + coefficient * unlikelihood_penalty(bad, level=level)`.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> good = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> bad = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> unlikelihood_loss(good, bad, coefficient=0.5)
        tensor(0.6151)
    """
    coefficient = number("coefficient", coefficient)
    return mle_loss(good) + coefficient * unlikelihood_penalty(bad, level=level)


def exmate_loss(
    good: Responses, bad: Responses, *, coefficient: float = 1.0, norm: str = "sequence_mean"
) -> Tensor:
    """Returns `mle_loss(good) + coefficient * exmate_penalty(bad, norm=norm)`.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> good = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> bad = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> exmate_loss(good, bad)
        tensor(0.6542)
    """
    coefficient = number("coefficient", coefficient)
    return mle_loss(good) + coefficient * exmate_penalty(bad, norm=norm)


def mate_loss(good: Responses, bad: Responses, *, coefficient: float = 1.0) -> Tensor:
    """Returns `mle_loss(good) + coefficient * mate_penalty(bad)`; the published code has 0.05.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> good = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> bad = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> mate_loss(good, bad)
        tensor(-1.)
    """
    coefficient = number("coefficient", coefficient)
    return mle_loss(good) + coefficient * mate_penalty(bad)


def _sequence_margins(rows: Rows, *, mean: bool) -> Tensor:
    """(B,): log P/(1-P), P the product of a response's p_t or (mean) their geometric mean.

    Through L = log(-S), which has digits where S underflows: 1/P - 1 = expm1(e^L).
    """
    m, s = rows.margins, rows.logps(mean=mean)
    # log(-l) = -m - e^-m/2 + O(e^-2m) from m = 20 on, exact in float64; each branch is clamped to
    # where it is finite, since a where passes 0 * inf on
    low, high = m.clamp(-1e30, 20), m.clamp(min=20)
    log_nll = torch.where(m > 20, -high - torch.exp(-high) / 2, (-F.logsigmoid(low)).log())
    log_s = rows.logsumexp(log_nll)
    if mean:
        # the log of an integer is float32
        log_s = log_s - rows.lengths.clamp(min=1).to(log_s.dtype).log()
    x = log_s.clamp(-80, 0).exp()
    near = -log_s - (torch.expm1(x) / x).log()  # P near 1
    far = s - torch.log1p(-s.clamp(max=-0.5).exp())  # P < 1/e
    return torch.where(log_s > 0, far, near)
